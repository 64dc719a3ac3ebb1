"""The preset `prelora`: its parameters in `convergence:` and `lora:`, and the phases that come of them."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from prelora_ds.config.fields import DurationField, Positive
from prelora_ds.config.phases import (
    FAMILIES,
    AdaptersConfig,
    AdapterTraining,
    Algorithm1,
    Factor,
    PhaseConfig,
    PhaseSettings,
    PreloraRule,
    PreloraUntil,
    PresetConfig,
    check_families,
    check_powers_of_two,
)
from prelora_ds.core.duration import Duration


class ConvergenceConfig(Algorithm1):
    """When the full phase of the preset ends: Algorithm 1 with its parameters."""


class LoraConfig(AdapterTraining):
    """Parameters of the preset `prelora`: the adapters, their ranks by Algorithm 2, and how they train.

    ``warmup`` is how long everything trains beside the adapters. ``train_rest`` keeps head, LayerNorms and embeddings
    (whatever is not an adapted linear) trainable in the LoRA phase. ``lr_scale`` is a factor of the learning rate of
    the adapters, and in the LoRA phase of all that trains. ``train_a: false`` leaves the A of each adapter at its
    first value (LoRA-FA). The other keys are those of `phases.*.adapters`.
    """

    families: tuple[str, ...] = FAMILIES
    r_min: Positive = 8
    r_max: Positive = 64
    warmup: DurationField = Duration("10 epochs")
    lr_scale: Factor = 1.0
    train_a: bool = True
    train_rest: bool = True

    @model_validator(mode="after")
    def _values_fit(self) -> LoraConfig:
        check_powers_of_two(self.r_min, self.r_max)
        check_families(self.families)
        return self


def expanded(phases: PresetConfig, convergence: ConvergenceConfig | None,
             lora: LoraConfig) -> tuple[PhaseConfig, ...]:
    """The phases of a preset, written out."""

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
