"""Have the stable ranks of the weights settled? A phase then ends, as full-rank training does in Cuttlefish."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from prelora_ds.core.switch_tests.prelora import Miss, Verdict, Windowing, WindowStats
from prelora_ds.core.switch_tests.progress import Progress

# A change of exactly tau must pass, but in float64 it has a rounding error.
_NOISE = 1e-9


@dataclass(frozen=True)
class StableRankTest:
    """It passes if the stable ranks of all families have changed by little in each of the last k - 1 comparisons.

    The stable rank of a family is the mean over its layers, |W|_F^2 / |W|_2^2 each, at the end of a window. Its change
    from one of the last ``k`` windows of ``m`` observations to the next must be at most ``tau`` per cent, up or down. A
    change that is not finite fails.

    Source: Cuttlefish (Wang et al. 2023, arXiv 2305.02538), which limits the change of the stable rank of each layer
    per epoch, in ranks and not in per cent, and of a moving average of it in its code.
    """

    tau: float
    k: int = 3
    m: int = 3
    title = "the test of stable ranks"
    needs = frozenset({"spectra"})

    @property
    def windowing(self) -> Windowing:
        return Windowing(self.m)

    def __call__(self, windows: Sequence[WindowStats], progress: Progress) -> Verdict:
        recent = windows[-self.k:]
        changes = [(Miss(family, _change(before, after, family), self.tau), before.index, after.index)
                   for before, after in pairwise(recent) for family in sorted(after.spectra)]
        largest, before_index, after_index = max(changes, key=lambda each: each[0].excess)
        if largest.excess <= 1 + _NOISE:
            return Verdict(True, f"all stable ranks changed by at most {abs(largest.value):.4g} % (tau {self.tau:g} %) "
                                 f"over windows {recent[0].index}-{recent[-1].index}")
        return Verdict(False, f"the stable rank of {largest.what} changed by {largest.value:.4g} % between windows "
                              f"{before_index} and {after_index} (tau {self.tau:g} %)", miss=largest)


def _change(before: WindowStats, after: WindowStats, family: str) -> float:
    """The change of the mean stable rank of ``family``, in per cent."""
    old, new = (_mean_stable_rank(window, family) for window in (before, after))
    if old == 0:
        return 0.0 if new == 0 else math.inf
    return (new - old) / old * 100


def _mean_stable_rank(window: WindowStats, family: str) -> float:
    spectra = window.spectra[family]
    return sum(spectra[layer].stable_rank for layer in sorted(spectra)) / len(spectra)
