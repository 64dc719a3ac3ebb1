"""The preset `prelora`: its parameters in `convergence:` and `lora:`, and the phases that it expands to."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from prelora_ds.config.adapters import (
    FAMILIES,
    AdaptersConfig,
    AdapterTraining,
    PreloraRule,
    check_families,
    check_powers_of_two,
    check_scaling,
)
from prelora_ds.config.fields import DurationField, Positive
from prelora_ds.config.phases import (
    Algorithm1,
    Factor,
    PhaseConfig,
    PhaseSettings,
    PreloraUntil,
    PresetConfig,
)
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


def expanded(phases: PresetConfig, convergence: ConvergenceConfig | None,
             lora: LoraConfig) -> tuple[PhaseConfig, ...]:
    """Expand a preset into its list of phases."""

    def phase(name: str, **keys: Any) -> PhaseConfig:
        settings: PhaseSettings = getattr(phases, name)
        return PhaseConfig(name=name, **{key: getattr(settings, key) for key in PhaseSettings.model_fields}, **keys)

    if convergence is None:
        return (phase("full"),)
    test = PreloraUntil(test="prelora", **dict(convergence))
    adapters = AdaptersConfig(
        ranks=PreloraRule(rule="prelora", r_min=lora.r_min, r_max=lora.r_max), families=lora.families,
        options={} if lora.train_a else {"train_a": False},
        **{key: getattr(lora, key) for key in AdapterTraining.model_fields})
    trained = ("adapters", "rest") if lora.train_rest else ("adapters",)
    return (phase("full", until=test),
            phase("warmup", adapters=adapters, until=lora.warmup, lr_scale={"adapters": lora.lr_scale}),
            phase("lora", train=trained, lr_scale=lora.lr_scale))
