"""The presets `prelora` and `authors`: parameters in `convergence:` and `lora:`, and the phases they expand to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from prelora_ds.config.adapters import (
    FAMILIES,
    AdaptersConfig,
    AdapterTraining,
    check_families,
    check_scaling,
)
from prelora_ds.config.fields import DurationField, FieldError, Positive
from prelora_ds.config.phases import Factor, PhaseConfig, PhaseSettings, PresetConfig
from prelora_ds.config.rank_rules import PreloraRule, check_powers_of_two
from prelora_ds.config.until import Algorithm1, PreloraUntil
from prelora_ds.core.duration import Duration


class ConvergenceConfig(Algorithm1):
    """The parameters of Algorithm 1, which ends the full phase of the preset."""


class LoraConfig(AdapterTraining):
    """Parameters of the preset `prelora`: the adapters, their ranks by Algorithm 2, and how they train."""

    families: tuple[str, ...] = FAMILIES
    """The families of linears that get adapters."""

    r_min: Positive = 8
    """The smallest rank of Algorithm 2; a power of two."""

    r_max: Positive = 64
    """The largest rank of Algorithm 2; a power of two, and at least `lora.r_min`."""

    warmup: DurationField = Duration("10 epochs")
    """How long all parameters train together with the adapters, before the LoRA phase begins."""

    lr_scale: Factor = 1.0
    """
    A factor of the learning rate of the adapters, and in the LoRA phase of everything that trains.
    """

    train_a: bool = True
    """
    Whether the matrix A of each adapter trains; `false` leaves it at its first value (LoRA-FA).
    """

    train_rest: bool = True
    """
    Whether head, norms and embeddings (everything that is not an adapted linear) also train in the
    LoRA phase.
    """

    @model_validator(mode="after")
    def _values_fit(self) -> LoraConfig:
        check_powers_of_two(self.r_min, self.r_max)
        check_families(self.families)
        check_scaling(self)
        return self


# What the code of PreLoRA's authors does; docs/papers.md compares it with the paper.
AUTHORS_TEST: Mapping[str, Any] = {
    "statistic": "last",
    "aggregate": "mean_of_layers",
    "strict": True,
    "windows": "sliding",
    "joined": {"output": ("o", "fc2")},
}
AUTHORS_ADAPTERS: Mapping[str, Any] = {"alpha_over_r": 2.0}
AUTHORS_REWARM = Duration("100 steps")


def check_authors(convergence: ConvergenceConfig, lora: LoraConfig) -> None:
    """Raise FieldError for a key that has another value than in the preset `authors`."""
    for section, values, fixed in (("convergence", convergence, AUTHORS_TEST), ("lora", lora, AUTHORS_ADAPTERS)):
        for key, value in fixed.items():
            given = getattr(values, key)
            if given not in (value, type(values).model_fields[key].get_default(call_default_factory=True)):
                raise FieldError(f"{section}.{key}", given, f"is {value!r} in the preset authors",
                                 f"remove {section}.{key}, or list the phases")


def expanded(phases: PresetConfig, convergence: ConvergenceConfig | None,
             lora: LoraConfig) -> tuple[PhaseConfig, ...]:
    """Expand a preset into its list of phases."""

    def phase(name: str, **keys: Any) -> PhaseConfig:
        settings: PhaseSettings = getattr(phases, name)
        return PhaseConfig(name=name, **{key: getattr(settings, key) for key in PhaseSettings.model_fields}, **keys)

    if convergence is None:
        return (phase("full"),)
    training = {key: getattr(lora, key) for key in AdapterTraining.model_fields}
    if phases.preset == "authors":
        test = PreloraUntil(test="prelora", **{**dict(convergence), **AUTHORS_TEST})
        ranks: dict[str, Any] = {"rank": lora.r_max}
        training["alpha_over_r"] = AUTHORS_ADAPTERS["alpha_over_r"]
        rewarm = AUTHORS_REWARM
    else:
        test = PreloraUntil(test="prelora", **dict(convergence))
        ranks = {"ranks": PreloraRule(rule="prelora", r_min=lora.r_min, r_max=lora.r_max)}
        rewarm = None

    adapters = AdaptersConfig(**ranks, families=lora.families, options={} if lora.train_a else {"train_a": False},
                              **training)
    trained = ("adapters", "rest") if lora.train_rest else ("adapters",)
    return (phase("full", until=test),
            phase("warmup", adapters=adapters, until=lora.warmup, lr_scale={"adapters": lora.lr_scale}, rewarm=rewarm),
            phase("lora", train=trained, lr_scale=lora.lr_scale))
