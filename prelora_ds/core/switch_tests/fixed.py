"""A phase that ends at a fixed share of the run: a control for tests that measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prelora_ds.core.switch_tests.prelora import Verdict, Windowing, WindowStats
from prelora_ds.core.switch_tests.progress import Progress, part_of


@dataclass(frozen=True)
class FixedTest:
    """It passes at the first observation from the share ``at`` of the run's steps on.

    The share is counted from the start of the run; a duration in `phases.*.until` is counted from the start of the
    phase.

    m: the observations of the windows that close meanwhile, on which ranks may depend; None closes none.
    """

    at: float
    m: int | None = None
    title = "the fixed test"
    k = 0
    needs = frozenset[str]()

    @property
    def windowing(self) -> Windowing | None:
        return None if self.m is None else Windowing(self.m)

    def __call__(self, windows: Sequence[WindowStats], progress: Progress) -> Verdict:
        end = part_of(self.at, progress.total_steps)
        return Verdict(progress.step >= end, f"{100 * self.at:g} % of the run is step {end} of {progress.total_steps}")
