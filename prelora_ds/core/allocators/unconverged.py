"""Progressive freezing: adapters that no longer change stop training, from the bottom of the model upwards."""

from __future__ import annotations

import math
from collections.abc import Sequence


def unconverged(changes: Sequence[tuple[str, float]], tau: float) -> frozenset[str]:
    """Return the adapters that continue to train: the first one that still changes, and all above it.

    An adapter has converged if its change is at most ``tau``. One that has converged above one that has not still
    trains: only a frozen beginning of the model shortens the backward pass. The last adapter always trains, and a
    change that is not finite has not converged.

    changes: (adapter, change of the norm of its effective weight), from the bottom of the model to its top.
    tau: the limit, in the unit of the changes.

    Raises ValueError if there are no adapters, or if ``tau`` is not positive.
    """
    if not changes:
        raise ValueError("there are no adapters to choose from")
    if not tau > 0:
        raise ValueError(f"tau {tau} is not positive")
    first = next((i for i, (_, change) in enumerate(changes) if not _converged(change, tau)), len(changes) - 1)
    return frozenset(adapter for adapter, _ in changes[first:])


def _converged(change: float, tau: float) -> bool:
    return math.isfinite(change) and abs(change) <= tau
