"""Which samples an optimizer step sees: a function of seed, step and sizes, and of nothing else.

Neither rank nor world size enters, so a run goes on from a step number alone, on any number of ranks.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def epoch_order(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """A permutation of ``0..samples-1``, shape [samples], for this epoch. Raises ValueError for negative arguments."""
    # NumPy keeps the raw stream of a bit generator for good, but not what Generator.permutation makes of it: a resume
    # under another NumPy must not mix two orders in one epoch.
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(samples)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


@lru_cache(maxsize=2)  # a batch across the border needs two epochs
def _kept_order(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    order = epoch_order(seed, epoch, samples)
    order.setflags(write=False)
    return order


def global_batch(seed: int, step: int, samples: int, global_batch_size: int) -> NDArray[np.int64]:
    """The rows (epoch, sample) of optimizer step ``step`` (from 0), shape [global_batch_size, 2].

    Step b is the b-th slice of the endless stream of `epoch_order` 0, 1, 2, ...: nothing is dropped at the end of an
    epoch, the batch there goes on into the next. Raises ValueError for sizes below 1 or a negative step.
    """
    if samples < 1 or global_batch_size < 1 or step < 0:
        raise ValueError(f"no batch {step} of {global_batch_size} out of {samples} samples")
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size, dtype=np.int64)
    rows = np.stack(np.divmod(positions, samples), axis=1)
    for epoch in range(rows[0, 0], rows[-1, 0] + 1):
        inside = rows[:, 0] == epoch
        rows[inside, 1] = _kept_order(seed, int(epoch), samples)[rows[inside, 1]]
    return rows
