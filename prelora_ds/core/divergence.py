"""When a step has diverged, and which updates are left out for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol


class Limits(Protocol):
    """A loss above ``spike`` times the mean of the last ``over`` losses is too high; with None no loss is."""

    @property
    def spike(self) -> float | None: ...

    @property
    def over(self) -> int: ...


@dataclass(frozen=True)
class DivergenceWatch:
    """losses: of the last steps that were sound. left_out: updates that were skipped. in_a_row: how many of them since
    the last sound step. rollbacks: how often the run went back. avoided: steps not to be taken again."""

    losses: tuple[float, ...] = ()
    left_out: int = 0
    in_a_row: int = 0
    rollbacks: int = 0
    avoided: frozenset[int] = frozenset()

    def problem(self, loss: float, limits: Limits) -> str | None:
        """What is wrong with a step of this ``loss``, in words; None if nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if limits.spike is None or len(self.losses) < limits.over:
            return None
        mean = math.fsum(self.losses) / len(self.losses)
        return (f"the loss {loss:.4g} is above {limits.spike:g} times {mean:.4g}, its mean of the last {limits.over} "
                "steps" if loss > limits.spike * mean else None)

    def accepts(self, step: int, loss: float, limits: Limits) -> bool:
        """Whether the update of ``step`` may be taken."""
        return step not in self.avoided and self.problem(loss, limits) is None

    def sound(self, loss: float, limits: Limits) -> DivergenceWatch:
        """After a step that was as it should be. Without ``limits.spike`` no losses are kept."""
        losses = (*self.losses, loss)[-limits.over:] if limits.spike is not None else ()
        return replace(self, losses=losses, in_a_row=0)

    def skipped(self) -> DivergenceWatch:
        """After an update that was left out."""
        return replace(self, left_out=self.left_out + 1, in_a_row=self.in_a_row + 1)

    def rolled_back(self, step: int, before: DivergenceWatch) -> DivergenceWatch:
        """The watch of a checkpoint gone back to, after ``before``, that of the run which diverged at ``step``."""
        return replace(self, rollbacks=before.rollbacks + 1, avoided=before.avoided | {step})
