"""Steps and epochs of a run, and the learning rate at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from prelora_ds.core.duration import Duration
from prelora_ds.core.plan import Plan


class Schedule(Protocol):
    """A linear warm-up to ``lr``, then one cosine to ``min_lr_ratio * lr`` at the end of the run."""

    @property
    def lr(self) -> float: ...

    @property
    def warmup(self) -> Duration: ...

    @property
    def min_lr_ratio(self) -> float: ...


@dataclass(frozen=True)
class Timeline:
    """Steps and epochs of a run of ``samples`` per epoch and ``global_batch`` per optimizer step.

    The stream of samples is endless: the batch that holds the last sample of an epoch holds the first of the next, so
    epoch e ends at optimizer step ``ceil((e + 1) * samples / global_batch)``.
    """

    samples: int
    global_batch: int
    duration: Duration

    @property
    def total_steps(self) -> int:
        if self.duration.unit == "%":
            raise ValueError("the duration of the run must be given in steps or epochs")
        return self._steps(self.duration)

    def step_after(self, start: int, duration: Duration) -> int:
        """The step at which ``duration`` has passed since step ``start``.

        Epochs are counted from the last epoch that ended at or before ``start``.
        """
        if duration.unit == "epoch":
            return self._epochs_to_steps(self.epochs_done(start) + duration.value)
        return start + self._steps(duration)

    def epochs_done(self, step: int) -> int:
        """The number of epochs whose samples have all been trained on after ``step`` optimizer steps."""
        return step * self.global_batch // self.samples

    def epoch_at(self, step: int) -> float:
        """The number of epochs after ``step`` optimizer steps, as a fraction."""
        return step * self.global_batch / self.samples

    def ticks(self, every: Duration) -> frozenset[int]:
        """The steps at which something that recurs every ``every`` is due, including the last step of the run."""
        total = self.total_steps
        steps: set[int] = set()
        i = 1
        while (step := self._tick(i, every)) < total:
            steps.add(step)
            i += 1
        return frozenset(steps | {total})

    def _tick(self, i: int, every: Duration) -> int:
        """The step of the ``i``-th repetition; there is at least one step between two of them."""
        if every.unit == "epoch":
            return max(i, self._epochs_to_steps(i * every.value))
        return i * max(1, self._steps(every))

    def _epochs_to_steps(self, epochs: Fraction) -> int:
        return math.ceil(epochs * self.samples / self.global_batch)

    def _steps(self, duration: Duration) -> int:
        if duration.unit == "epoch":
            return self._epochs_to_steps(duration.value)
        if duration.unit == "%":
            return math.ceil(duration.value * self.total_steps / 100)
        return int(duration.value)


def lr_at(step: int, plan: Plan, *, timeline: Timeline, schedule: Schedule) -> float:
    """The learning rate of the ``step``-th optimizer step (the first is 1), before any scale per role.

    The last step of the warm-up has ``schedule.lr``, and the last step of the run ``min_lr_ratio`` times that. In the
    first ``rewarm`` steps of a plan the learning rate rises linearly to this schedule (ReLoRA, Lialin et al. 2023,
    section 3).
    """
    lr = _scheduled(step, timeline, schedule)
    steps_in_plan = step - plan.since_step
    return lr * steps_in_plan / plan.rewarm if steps_in_plan < plan.rewarm else lr


def _scheduled(step: int, timeline: Timeline, schedule: Schedule) -> float:
    total = timeline.total_steps
    warmup = timeline.step_after(0, schedule.warmup)
    if step <= warmup:
        return schedule.lr * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.lr * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * cosine)
