"""Has the loss stopped falling? Welch's t-test on the losses of successive windows.

The idea to end full training by a significance test is that of HpT (Dahal et al. 2025, IEEE TPDS,
doi:10.1109/TPDS.2024.3522781), which the authors of PreLoRA build on. This is not a reproduction of it: here one model
trains, and the losses of its own successive windows are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from prelora_ds.core.switch_tests.prelora import Miss, Verdict, Windowing, WindowStats
from prelora_ds.core.switch_tests.progress import Progress


@dataclass(frozen=True)
class LossTTest:
    """It passes if in none of the last ``k`` - 1 comparisons the loss fell significantly at the level ``alpha``.

    Each window of ``m`` observations is compared with the one before. The null hypothesis is that the mean loss has not
    fallen; the fall is significant if its p-value is at most ``alpha``.

    Losses of one window are taken as independent, but the loss also falls within a window. This makes their variance
    larger, so that a fall counts as significant less often. NaN and infinity fail.

    Raises ValueError for fewer than 2 windows or observations, and for an ``alpha`` outside of 0 to 1.
    """

    alpha: float = 0.05
    k: int = 2
    m: int = 10
    title = "the t-test"
    needs = frozenset({"loss"})

    def __post_init__(self) -> None:
        if self.k < 2 or self.m < 2:
            raise ValueError(f"a t-test needs at least 2 windows of 2 observations, not {self.k} of {self.m}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha {self.alpha} is not a probability between 0 and 1")

    @property
    def windowing(self) -> Windowing:
        return Windowing(self.m)

    def __call__(self, windows: Sequence[WindowStats], progress: Progress) -> Verdict:
        recent = windows[-self.k:]
        if len(recent) < self.k:
            return Verdict(False, f"{len(recent)} of {self.k} windows seen")
        unknown = [window.index for window in recent if len(window.losses) < 2]
        if unknown:
            return Verdict(False, f"window {unknown[0]} has no single losses: an earlier version closed it")

        found = [(fall_p_value(before.losses, after.losses), before, after) for before, after in pairwise(recent)]
        lowest, before, after = min(found, key=lambda each: -1.0 if math.isnan(each[0]) else each[0])
        reason = (f"p {lowest:.3g} that the loss did not fall between windows {before.index} and {after.index} "
                  f"(alpha {self.alpha:g})")
        passed = lowest > self.alpha
        miss = None if passed else Miss("confidence that the loss falls", 1 - lowest, 1 - self.alpha)
        return Verdict(passed, reason, miss=miss)


def fall_p_value(before: Sequence[float], after: Sequence[float]) -> float:
    """The one-sided p-value of Welch's t-test against the hypothesis that the mean did not fall.

    NaN if a value is not finite, or too large to be squared. Without any variance it is 0 if the mean fell, else 1.
    Source: Welch 1947, with the degrees of freedom of Satterthwaite. Raises ValueError for fewer than 2 values.
    """
    if min(len(before), len(after)) < 2:
        raise ValueError("a t-test needs at least 2 values on both sides")
    if not all(map(math.isfinite, (*before, *after))):
        return math.nan
    (mean_0, error_0), (mean_1, error_1) = _mean_and_error(before), _mean_and_error(after)
    error = error_0 + error_1
    if not math.isfinite(error):
        return math.nan
    if error == 0:
        return 0.0 if mean_1 < mean_0 else 1.0
    t = (mean_0 - mean_1) / math.sqrt(error)
    # As shares of their sum, because the square of a tiny variance would be 0.
    freedom = 1 / ((error_0 / error) ** 2 / (len(before) - 1) + (error_1 / error) ** 2 / (len(after) - 1))
    return _upper_tail(t, freedom)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the square of its standard error."""
    n = len(values)
    mean = sum(values) / n
    return mean, sum((value - mean) * (value - mean) for value in values) / (n - 1) / n


def _upper_tail(t: float, freedom: float) -> float:
    """The probability that Student's t with so many degrees of ``freedom`` is at least ``t``."""
    half = _incomplete_beta(freedom / (freedom + t * t), freedom / 2) / 2
    return half if t > 0 else 1 - half


def _incomplete_beta(x: float, a: float) -> float:
    """The regularised incomplete beta function I_x(a, 1/2), for 0 <= x <= 1.

    It is a continued fraction, which converges fast for x below (a + 1) / (a + 5/2), and above it by symmetry. Source:
    DLMF 8.17.22 and 8.17.4, evaluated by Lentz's method.
    """
    if x in (0.0, 1.0):
        return x
    b = 0.5
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1) / (a + b + 2):
        return math.exp(log_front) * _fraction(x, a, b) / a
    return 1 - math.exp(log_front) * _fraction(1 - x, b, a) / b


def _fraction(x: float, a: float, b: float) -> float:
    value = ratio = 1.0
    inverse = 1 / (1 - (a + b) * x / (a + 1))
    value *= inverse
    for n in range(1, 1000):
        even = n * (b - n) * x / ((a + 2 * n - 1) * (a + 2 * n))
        odd = -(a + n) * (a + b + n) * x / ((a + 2 * n) * (a + 2 * n + 1))
        for term in (even, odd):
            inverse = 1 / (1 + term * inverse)
            ratio = 1 + term / ratio
            value *= ratio * inverse
        if abs(ratio * inverse - 1) < 1e-15:
            break
    return value
