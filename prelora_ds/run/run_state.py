"""The state of a run beside its weights: all that the loop changes, saved and read back whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from prelora_ds.config.training import TrainConfig
from prelora_ds.core.controller import PhaseState
from prelora_ds.core.divergence import DivergenceWatch
from prelora_ds.engine.build import StepStats
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

    def forget_measurements(self) -> None:
        """Keep what the weights are, and drop what was measured by the settings of the run that they come from."""
        self.phase = self.phase.without_open_window()
        self.window, self.logged = Meter(), Meter()
        self.watch, self.corrupt, self.best_acc1 = DivergenceWatch(), (0, 0), None

    def count(self, stats: StepStats, config: TrainConfig, *, data_s: float) -> dict[str, float]:
        """Count a step that may stand; columns for the log where its update was left out.

        data_s: seconds that this rank waited for its data.
        """
        if stats.skipped:
            self.watch = self.watch.after_skipped()
            return {"left_out": self.watch.left_out, "left_out_loss": stats.loss}
        self.watch = self.watch.after_accepted(stats.loss, config.divergence)
        for meter in (self.window, self.logged):
            meter.add(stats.loss, config.global_batch_size, corrupt=stats.corrupt, step_s=stats.step_s, data_s=data_s)
        return {}
