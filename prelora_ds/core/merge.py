"""ReLoRA: adapters that are merged into the weights again and again (Lialin et al. 2023, section 3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from prelora_ds.core.duration import Duration

ResetRule = Literal["zero", "magnitude", "random"]
RESET_RULES: tuple[ResetRule, ...] = get_args(ResetRule)
PROBES = 4  # random images on which the change of the outputs is measured, before and after a merge


@dataclass(frozen=True)
class Reset:
    """How much of the Adam moments of the adapters is set to zero when they are merged.

    rule: ``zero`` resets all of them, ``magnitude`` the elements with the smallest first moments, ``random`` elements
    that are drawn at random. Both moments of an element are reset or kept together.
    share: the share of the elements that is reset.
    """

    rule: ResetRule = "zero"
    share: float = 1.0

    def count(self, elements: int) -> int:
        """How many of a parameter's ``elements`` are reset."""
        return elements if self.rule == "zero" else round(self.share * elements)


@dataclass(frozen=True)
class Merge:
    """When the adapters of a phase are merged, and how they begin again.

    every: the length of a cycle, from the start of the phase.
    rewarm: how long the learning rate then rises from 0 to its schedule.
    """

    every: Duration
    reset: Reset = field(default_factory=Reset)
    rewarm: Duration | None = None
