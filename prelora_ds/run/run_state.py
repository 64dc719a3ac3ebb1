"""The state of a run beside its weights: all that the loop changes, saved and read back whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

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

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """``plan`` is the engine's: at the last step of a run a new one may be decided and never begun."""
        return {"step": self.step, "phase": replace(self.phase, plan=plan).to_json(), "watch": self.watch.to_json(),
                "window": self.window.to_json(), "logged": self.logged.to_json(),
                "accuracy": self.accuracy and asdict(self.accuracy), "corrupt": self.corrupt,
                "evaluated_at": self.evaluated_at, "best_acc1": self.best_acc1}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunState:
        return cls(data["step"], PhaseState.from_json(data["phase"]), DivergenceWatch.from_json(data["watch"]),
                   Meter.from_json(data["window"]), Meter.from_json(data["logged"]),
                   data["accuracy"] and Accuracy(**data["accuracy"]), tuple(data["corrupt"]),
                   # absent in checkpoints of version 0.1.0
                   data.get("evaluated_at"), data.get("best_acc1"))
