"""Which samples an optimizer step sees: a function of seed, step and sizes, and of nothing else.

Neither rank nor world size enters, so a run goes on from a step number alone, on any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Tail = Literal["continue", "drop"]


def epoch_order(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """A permutation of ``0..samples-1``, shape [samples], for this epoch. Raises ValueError for negative arguments."""
    # NumPy keeps the raw stream of a bit generator for good, but not what Generator.permutation makes of it: a resume
    # under another NumPy must not mix two orders in one epoch.
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(samples)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


@lru_cache(maxsize=1)
def _kept_order(seed: int, epoch: int, samples: int) -> NDArray[np.uint32]:
    """One order a process is kept, in 4 bytes a sample: each rank of a node has its own."""
    order = epoch_order(seed, epoch, samples).astype(np.uint32)
    order.setflags(write=False)
    return order


class Position(NamedTuple):
    """Where the next batch begins: ``offset`` samples into ``epoch``."""

    epoch: int
    offset: int


@dataclass(frozen=True)
class Stream:
    """The endless stream of epochs, cut into global batches.

    tail: what becomes of the samples that are left over at the end of an epoch. ``continue``: the batch goes on into
    the next epoch, and none is lost. ``drop``: they are left out (others in each epoch), and an epoch begins with a
    batch. Raises ValueError for sizes below 1, and for ``drop`` with less than one batch in an epoch.
    """

    samples: int
    global_batch_size: int
    tail: Tail = "continue"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.global_batch_size < 1 or self.samples_per_epoch < 1:
            raise ValueError(
                f"no batches of {self.global_batch_size} out of {self.samples} samples, tail {self.tail}"
            )

    @property
    def samples_per_epoch(self) -> int:
        """Those that an epoch gives to training."""
        return self.samples - (self.samples % self.global_batch_size if self.tail == "drop" else 0)

    def position(self, step: int) -> Position:
        """Where optimizer step ``step`` (from 0) begins."""
        return Position(*divmod(step * self.global_batch_size, self.samples_per_epoch))

    def step_at(self, position: Position) -> int:
        """The step that begins at ``position``; raises ValueError where none does."""
        before = position.epoch * self.samples_per_epoch + position.offset
        if (
            not 0 <= position.offset < self.samples_per_epoch
            or before < 0
            or before % self.global_batch_size
        ):
            raise ValueError(
                f"{position} is no begin of a batch of {self.global_batch_size} out of {self.samples}"
            )
        return before // self.global_batch_size

    def batch(self, seed: int, step: int) -> NDArray[np.int64]:
        """The rows (epoch, sample) of a step, shape [global_batch_size, 2]. Raises ValueError for a negative step.

        Costs no more than one `epoch_order`, however late the step.
        """
        if step < 0:
            raise ValueError(f"there is no step {step}")
        first = step * self.global_batch_size
        rows = np.stack(
            np.divmod(np.arange(first, first + self.global_batch_size), self.samples_per_epoch),
            axis=1,
        )
        for epoch in range(rows[0, 0], rows[-1, 0] + 1):
            inside = rows[:, 0] == epoch
            rows[inside, 1] = _kept_order(seed, int(epoch), self.samples)[rows[inside, 1]]
        return rows
