"""Whether a step has diverged, and which updates are skipped because of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol


class Limits(Protocol):
    """A loss is too high above ``spike`` times the mean of the last ``over`` losses; None means no limit."""

    @property
    def spike(self) -> float | None: ...

    @property
    def over(self) -> int: ...


@dataclass(frozen=True)
class DivergenceWatch:
    """What a run remembers in order to detect and avoid divergence.

    losses: the losses of the last accepted steps.
    left_out: the number of skipped updates.
    in_a_row: the number of skipped updates since the last accepted step.
    rollbacks: how often the run rolled back to a checkpoint.
    avoided: the steps whose updates are skipped when the run reaches them again.
    """

    losses: tuple[float, ...] = ()
    left_out: int = 0
    in_a_row: int = 0
    rollbacks: int = 0
    avoided: frozenset[int] = frozenset()

    def problem(self, loss: float, limits: Limits) -> str | None:
        """Describe what is wrong with a step of this ``loss``; None if nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if limits.spike is None or len(self.losses) < limits.over:
            return None
        mean = math.fsum(self.losses) / len(self.losses)
        if loss <= limits.spike * mean:
            return None
        return (f"the loss {loss:.4g} is above {limits.spike:g} times {mean:.4g}, its mean over the last "
                f"{limits.over} steps")

    def accepts(self, step: int, loss: float, limits: Limits) -> bool:
        """Whether the update of ``step`` may be made."""
        return step not in self.avoided and self.problem(loss, limits) is None

    def after_accepted(self, loss: float, limits: Limits) -> DivergenceWatch:
        """The watch after an accepted step. Without ``limits.spike`` it keeps no losses."""
        losses = (*self.losses, loss)[-limits.over:] if limits.spike is not None else ()
        return replace(self, losses=losses, in_a_row=0)

    def after_skipped(self) -> DivergenceWatch:
        """The watch after a skipped update."""
        return replace(self, left_out=self.left_out + 1, in_a_row=self.in_a_row + 1)

    def rolled_back(self, step: int, before: DivergenceWatch) -> DivergenceWatch:
        """The watch of the checkpoint that the run rolls back to.

        before: the watch with which the run diverged at ``step``.
        """
        return replace(self, rollbacks=before.rollbacks + 1, avoided=before.avoided | {step})
