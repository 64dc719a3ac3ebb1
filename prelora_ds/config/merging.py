"""`merge:` of a phase: how often its adapters are merged into the weights, and how they begin again (ReLoRA)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from prelora_ds.config.fields import DurationField, FieldError, Strict
from prelora_ds.core.merge import Merge, Reset, ResetRule


class ResetConfig(Strict):
    """What becomes of the Adam moments of the adapters at a merge."""

    rule: ResetRule = "zero"
    """
    Which moments are set to zero: `zero` all of them, `magnitude` those with the smallest first
    moments, `random` some that are drawn at random. Both moments of an element are treated alike,
    and every Adam step count begins at 0 again.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of the elements that is set to zero, for the rules `magnitude` and `random`."""

    @model_validator(mode="after")
    def _share_fits(self) -> ResetConfig:
        if self.rule == "zero" and self.share != 1.0:
            raise FieldError("share", self.share, "is not used by the rule zero, which resets all moments",
                             "choose magnitude or random, or remove share")
        return self


class MergeConfig(Strict):
    """When the adapters of a phase are merged into the frozen weights, and how they begin again."""

    every: DurationField
    """The length of a cycle, counted from the start of the phase."""

    reset: ResetConfig = ResetConfig()
    """What becomes of the Adam moments of the adapters."""

    rewarm: DurationField | None = None
    """
    How long the learning rate rises from 0 to its schedule after each merge; `null` for no such
    rise.
    """

    @model_validator(mode="after")
    def _cycles_are_longer_than_nothing(self) -> MergeConfig:
        if self.every.value == 0:
            raise FieldError("every", str(self.every), "must be longer than 0")
        return self

    def merge(self) -> Merge:
        """Return the merge in the form that the controller needs."""
        return Merge(self.every, Reset(self.reset.rule, self.reset.share), self.rewarm)
