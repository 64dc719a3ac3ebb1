"""Steps and epochs of a run, and the learning rate at each step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

from prelora_ds.core.duration import Duration


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

    def period_ends(self, start: int, every: Duration) -> frozenset[int]:
        """The steps after ``start`` at which a whole number of periods has passed, to the end of the run.

        At least one step lies between two of them.
        """
        return _period_ends(self, start, every)

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

    def next_ticks(self, step: int, every: Duration, count: int) -> list[int]:
        """The first ``count`` of `ticks` after ``step``, or as many as there are."""
        total = self.total_steps
        i = bisect_right(range(1, total + 1), step, key=lambda n: self._tick(n, every)) + 1
        found = [min(total, self._tick(n, every)) for n in range(i, i + count)]
        return [tick for n, tick in enumerate(found) if tick > step and tick not in found[:n]]

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


@lru_cache  # because it is asked after every step
def _period_ends(timeline: Timeline, start: int, every: Duration) -> frozenset[int]:
    ends: list[int] = []
    end = start
    while end < timeline.total_steps:
        end = max(end + 1, timeline.step_after(end, every))
        ends.append(end)
    return frozenset(ends)


@dataclass(frozen=True)
class Restart:
    """After optimizer step ``step`` the learning rate begins at 0 and rises for ``rewarm`` steps to the schedule."""

    step: int
    rewarm: int


def rate_factor(step: int, *, total: int, warmup: int, min_ratio: float, restarts: Sequence[int] = (),
                rewarm: int | Sequence[int] = 0) -> float:
    """Return the learning rate at ``step`` as a share of its peak.

    It is a jagged cosine (ReLoRA, Lialin et al. 2023, section 3): it rises linearly for ``warmup`` steps and then
    follows one cosine that ends at ``min_ratio`` after ``total`` steps. At each restart it falls to 0. From there it
    rises linearly, and after ``rewarm`` steps it is on the cosine again.

    restarts: the steps at which it is 0, ascending. rewarm: a number of steps for all restarts, or one for each.

    Raises ValueError if there is not one ``rewarm`` for each restart.
    """
    each = [rewarm] * len(restarts) if isinstance(rewarm, int) else rewarm
    if len(each) != len(restarts):
        raise ValueError(f"{len(each)} numbers of steps to rewarm for {len(restarts)} restarts")
    return _rate(1.0, step, total, warmup, min_ratio, list(map(Restart, restarts, each)))


def lr_at(step: int, restarts: Sequence[Restart], *, timeline: Timeline, schedule: Schedule) -> float:
    """The learning rate of the ``step``-th optimizer step (the first is 1), before any scale per role.

    The last step of the warm-up has ``schedule.lr``, and the last step of the run ``min_lr_ratio`` times that.
    """
    warmup = timeline.step_after(0, schedule.warmup)
    return _rate(schedule.lr, step, timeline.total_steps, warmup, schedule.min_lr_ratio, restarts)


def _rate(peak: float, step: int, total: int, warmup: int, min_ratio: float, restarts: Sequence[Restart]) -> float:
    past = [restart for restart in restarts if restart.step <= step]
    if past and step - past[-1].step < past[-1].rewarm:
        last = past[-1]
        target = _scheduled(peak, last.step + last.rewarm, total, warmup, min_ratio)
        return target * (step - last.step) / last.rewarm
    return _scheduled(peak, step, total, warmup, min_ratio)


def _scheduled(peak: float, step: int, total: int, warmup: int, min_ratio: float) -> float:
    """The learning rate without restarts."""
    if step < warmup or step == warmup > 0:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (min_ratio + (1 - min_ratio) * cosine)
