"""The limit on unreadable samples per epoch."""

from __future__ import annotations

from fractions import Fraction

from prelora_ds.errors import ExpectedError


class CorruptBudgetError(ExpectedError, RuntimeError):
    """More samples of an epoch are unreadable than `data.corrupt_budget` allows."""


class CorruptBudget:
    """At most ``share`` of the ``samples`` of an epoch may be unreadable.

    A count is (epoch, unreadable samples of it so far on all ranks); each epoch begins at 0.
    """

    def __init__(self, share: float, samples: int) -> None:
        self._share, self._samples = share, samples

    def after(self, count: tuple[int, int], epoch: int, corrupt: int) -> tuple[int, int]:
        """Return the count after a step of ``epoch`` with ``corrupt`` unreadable samples."""
        before = count[1] if count[0] == epoch else 0
        return epoch, before + corrupt

    def exceeded(self, count: tuple[int, int]) -> bool:
        """Return whether ``count`` is above the budget; ranks with equal counts agree."""
        return (
            count[1] > Fraction(str(self._share)) * self._samples
        )  # as written: 0.29 * 100 is below 29 in floats

    def error(self, count: tuple[int, int], fault: str) -> CorruptBudgetError:
        """Return the error to raise for ``count``; ``fault`` describes one of the samples."""
        return CorruptBudgetError(
            f"{count[1]} unreadable samples in epoch {count[0]} exceed data.corrupt_budget "
            f"({self._share:g} of {self._samples} samples); for example: {fault}\n"
            "  remedy: `prelora shards verify FOLDER --decode` lists what is damaged; write those "
            "shards again, or raise data.corrupt_budget"
        )
