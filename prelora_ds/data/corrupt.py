"""How many unreadable samples a run bears."""

from __future__ import annotations

from fractions import Fraction

from prelora_ds.errors import ExpectedError


class CorruptBudgetError(ExpectedError, RuntimeError):
    """More samples of an epoch could not be read than `data.corrupt_budget` allows."""


class CorruptBudget:
    """At most ``share`` of the ``samples`` of an epoch may be unreadable.

    A count is (epoch, unreadable samples in it so far on all ranks); it begins anew with each epoch.
    """

    def __init__(self, share: float, samples: int) -> None:
        self._share, self._samples = share, samples

    def after(self, count: tuple[int, int], epoch: int, corrupt: int) -> tuple[int, int]:
        """The count after a step of ``epoch`` with ``corrupt`` unreadable samples."""
        before = count[1] if count[0] == epoch else 0
        return epoch, before + corrupt

    def exceeded(self, count: tuple[int, int]) -> bool:
        """Whether that is more than the budget; equal counts give equal answers on all ranks."""
        return (
            count[1] > Fraction(str(self._share)) * self._samples
        )  # as written: 0.29 * 100 is below 29 in floats

    def error(self, count: tuple[int, int], fault: str) -> CorruptBudgetError:
        """What to raise then; ``fault`` is one of the samples, in words."""
        return CorruptBudgetError(
            f"{count[1]} unreadable samples in epoch {count[0]} are more than data.corrupt_budget "
            f"= {self._share:g} of {self._samples} samples allows; one of them: {fault}\n  remedy: `prelora shards "
            "verify FOLDER --decode` lists what is damaged; write those shards again, or raise "
            "data.corrupt_budget"
        )
