"""How many unreadable samples a run bears."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from prelora_ds.errors import ExpectedError


class CorruptBudgetError(ExpectedError, RuntimeError):
    """More samples of an epoch could not be read than `data.corrupt_budget` allows."""


class CorruptBudget:
    """At most ``share`` of the ``samples`` of an epoch may be unreadable; the count begins anew with each epoch."""

    def __init__(self, share: float, samples: int) -> None:
        self._share, self._samples = share, samples
        self._epoch, self._count, self._last = 0, 0, ""

    def spent(self, epoch: int, corrupt: int, faults: Sequence[str]) -> bool:
        """Whether the budget is used up after a step of ``epoch`` with ``corrupt`` unreadable samples on all ranks.

        ``faults`` are this rank's own. Ranks that are given the same counts give the same answers.
        """
        if epoch != self._epoch:
            self._epoch, self._count = epoch, 0
        self._count += corrupt
        self._last = next(iter(faults), self._last)
        return self._count > Fraction(str(self._share)) * self._samples  # as written: 0.29 * 100 is below 29 in floats

    @property
    def count(self) -> tuple[int, int]:
        """(epoch, unreadable samples in it so far), for a checkpoint."""
        return self._epoch, self._count

    def go_on(self, epoch: int, corrupt: int) -> None:
        """Count on from where a checkpoint stood."""
        self._epoch, self._count = epoch, corrupt

    def error(self, last_of_ranks: Sequence[str]) -> CorruptBudgetError:
        """What to raise then, with a fault out of `last_fault` of all ranks."""
        fault = next(filter(None, last_of_ranks), "")
        return CorruptBudgetError(
            f"{self._count} unreadable samples in epoch {self._epoch} are more than data.corrupt_budget "
            f"= {self._share:g} of {self._samples} samples allows; one of them: {fault}\n  remedy: `prelora shards "
            "verify FOLDER --decode` lists what is damaged; write those shards again, or raise "
            "data.corrupt_budget")

    @property
    def last_fault(self) -> str:
        """The last one of this rank, or nothing."""
        return self._last
