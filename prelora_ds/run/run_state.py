"""The state of a run beside its weights: all that the loop changes, saved and read back whole."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from prelora_ds.core.controller import PhaseState
from prelora_ds.core.divergence import DivergenceWatch
from prelora_ds.core.plan import Plan
from prelora_ds.run.evaluate import Accuracy
from prelora_ds.run.log import Meter


@dataclass
class RunState:
    """After ``step`` optimizer steps.

    window, logged: what has been measured since the last measurement and the last logged row.
    accuracy: of the last evaluation, which was after ``evaluated_at`` steps. best_acc1: the highest so far.
    corrupt: (epoch, samples in it that could not be read so far).
    """

    step: int
    phase: PhaseState
    watch: DivergenceWatch
    window: Meter = field(default_factory=Meter)
    logged: Meter = field(default_factory=Meter)
    accuracy: Accuracy | None = None
    corrupt: tuple[int, int] = (0, 0)
    evaluated_at: int | None = None
    best_acc1: float | None = None

    @property
    def acc1(self) -> float | None:
        """The top-1 accuracy of these very weights; None if they were not evaluated."""
        return self.accuracy.acc1 if self.accuracy is not None and self.evaluated_at == self.step else None

    def evaluated(self, step: int, accuracy: Accuracy) -> bool:
        """Record an evaluation; whether no earlier one was as good."""
        self.accuracy, self.evaluated_at = accuracy, step
        improved = self.best_acc1 is None or accuracy.acc1 > self.best_acc1
        if improved:
            self.best_acc1 = accuracy.acc1
        return improved

    def at_plan(self, plan: Plan) -> RunState:
        """This state with the plan of the engine: the last step may decide on one that never begins."""
        return replace(self, phase=replace(self.phase, plan=plan))
