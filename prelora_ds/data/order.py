"""The samples of each optimizer step, as a function of seed, step and sizes.

Neither rank nor world size matters, so a run can resume from a step number on any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Tail = Literal["continue", "drop"]


def epoch_order(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """Return the permutation of ``0..samples-1`` for this epoch, shape [samples].

    Raises ValueError for negative arguments.
    """
    # NumPy guarantees the raw bit stream across versions, but not Generator.permutation: a resume
    # under another NumPy must not mix two orders in one epoch.
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(samples)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


@lru_cache(maxsize=1)
def _cached_order(seed: int, epoch: int, samples: int) -> NDArray[np.uint32]:
    """Return `epoch_order`; each process caches one order, at 4 bytes per sample."""
    order = epoch_order(seed, epoch, samples).astype(np.uint32)
    order.setflags(write=False)
    return order


class Position(NamedTuple):
    """The position at which a batch begins: ``offset`` samples into ``epoch``."""

    epoch: int
    offset: int


@dataclass(frozen=True)
class Stream:
    """The endless stream of epochs, cut into global batches.

    tail: what happens to the samples that are left over at the end of an epoch. ``continue``: the
    batch continues into the next epoch, and no sample is lost. ``drop``: they are left out
    (different ones in each epoch), and every epoch begins with a new batch.

    Raises ValueError for sizes below 1, and for ``drop`` with less than one batch per epoch.
    """

    samples: int
    global_batch_size: int
    tail: Tail = "continue"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.global_batch_size < 1 or self.samples_per_epoch < 1:
            raise ValueError(
                f"{self.samples} samples do not make a batch of {self.global_batch_size} "
                f"(tail {self.tail})"
            )

    @property
    def samples_per_epoch(self) -> int:
        """The number of samples of an epoch that training uses."""
        return self.samples - (self.samples % self.global_batch_size if self.tail == "drop" else 0)

    def position(self, step: int) -> Position:
        """Return where optimizer step ``step`` (from 0) begins."""
        return Position(*divmod(step * self.global_batch_size, self.samples_per_epoch))

    def step_at(self, position: Position) -> int:
        """Return the step that begins at ``position``; raise ValueError if none does."""
        before = position.epoch * self.samples_per_epoch + position.offset
        inside = 0 <= position.offset < self.samples_per_epoch
        if not inside or before < 0 or before % self.global_batch_size:
            raise ValueError(
                f"{position} is not the start of a batch of {self.global_batch_size} out of "
                f"{self.samples}"
            )
        return before // self.global_batch_size

    def batch(self, seed: int, step: int) -> NDArray[np.int64]:
        """Return the rows (epoch, sample) of a step, shape [global_batch_size, 2].

        This costs at most one `epoch_order` per epoch that the batch touches, however late the
        step. Raises ValueError for a negative step.
        """
        if step < 0:
            raise ValueError(f"there is no step {step}")
        first = step * self.global_batch_size
        stream_offsets = np.arange(first, first + self.global_batch_size)
        rows = np.stack(np.divmod(stream_offsets, self.samples_per_epoch), axis=1)
        for epoch in range(rows[0, 0], rows[-1, 0] + 1):
            inside = rows[:, 0] == epoch
            rows[inside, 1] = _cached_order(seed, int(epoch), self.samples)[rows[inside, 1]]
        return rows
