"""The state of a run apart from its weights: what the loop changes and a checkpoint saves."""

from __future__ import annotations

from dataclasses import dataclass, field

from prelora_ds.config.training import TrainConfig
from prelora_ds.core.controller import PhaseState
from prelora_ds.core.divergence import DivergenceWatch
from prelora_ds.engine.engine import StepStats
from prelora_ds.run.evaluate import Accuracy
from prelora_ds.run.log import Meter


@dataclass
class RunState:
    """The state after ``step`` optimizer steps.

    window, logged: what has been measured since the last observation, and since the last logged
    row.
    accuracy: the result of the last evaluation, which took place after ``evaluated_at`` steps.
    best_acc1: the highest top-1 accuracy so far.
    corrupt: the current epoch and the number of its samples that could not be read so far.
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
        """The top-1 accuracy of exactly these weights; None if they were not evaluated."""
        if self.accuracy is None or self.evaluated_at != self.step:
            return None
        return self.accuracy.acc1

    def evaluated(self, step: int, accuracy: Accuracy) -> bool:
        """Record an evaluation; return whether it is better than all earlier ones."""
        self.accuracy = accuracy
        self.evaluated_at = step
        improved = self.best_acc1 is None or accuracy.acc1 > self.best_acc1
        if improved:
            self.best_acc1 = accuracy.acc1
        return improved

    def forget_measurements(self) -> None:
        """Drop what was measured under the settings of the run that the weights come from."""
        self.phase = self.phase.without_open_window()
        self.window = Meter()
        self.logged = Meter()
        self.watch = DivergenceWatch()
        self.corrupt = (0, 0)
        self.best_acc1 = None

    def count(self, stats: StepStats, config: TrainConfig, *, data_s: float) -> dict[str, float]:
        """Count a step that the run keeps; return columns for the log if its update was skipped.

        data_s: seconds that this rank waited for its data.
        """
        if stats.skipped:
            self.watch = self.watch.after_skipped()
            return {"left_out": self.watch.left_out, "left_out_loss": stats.loss}
        self.watch = self.watch.after_accepted(stats.loss, config.divergence)
        for meter in (self.window, self.logged):
            meter.add(
                stats.loss,
                config.global_batch_size,
                corrupt=stats.corrupt,
                top1=stats.top1,
                top5=stats.top5,
                judged=stats.judged,
                step_s=stats.step_s,
                data_s=data_s,
            )
        return {}
