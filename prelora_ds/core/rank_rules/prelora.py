"""Rank assignment (PreLoRA, Algorithm 2): the layers that still move get the larger adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prelora_ds.core.switch_tests.prelora import WindowStats, changes_by_layer

# v * n may come out a hair above a whole number that it should equal; that hair must not buy the next rank.
_NOISE = 1e-9


def assign_ranks(
    changes: Mapping[str, Mapping[int, float]], *, r_min: int, r_max: int
) -> dict[str, dict[int, int]]:
    """PreLoRA, Algorithm 2: a rank for every layer, family by family.

    ``changes`` is family -> layer -> norm change between the last two windows; only its magnitude counts, and only
    relative to the family's smallest and largest (so any unit will do). Candidates are the powers of two in
    [``r_min``, ``r_max``]; the smallest change gets ``r_min``, the largest ``r_max``, and where all are equal, or the
    family has one layer, ``r_min``. Returns family -> layer -> rank.

    Raises ValueError for bounds that are not powers of two or in the wrong order, for a family without layers and for
    changes that are not finite.
    """
    for name, rank in (("r_min", r_min), ("r_max", r_max)):
        if rank < 1 or rank & (rank - 1):
            raise ValueError(f"{name} {rank} is not a power of two; Algorithm 2 chooses among powers of two")
    if r_min > r_max:
        raise ValueError(f"r_min {r_min} is larger than r_max {r_max}")
    ranks = [1 << exponent for exponent in range(r_min.bit_length() - 1, r_max.bit_length())]
    return {family: _ranks_of_family(family, layers, ranks) for family, layers in changes.items()}


def _ranks_of_family(family: str, changes: Mapping[int, float], ranks: list[int]) -> dict[int, int]:
    if not changes:
        raise ValueError(f"family {family} has no layers")
    for layer, change in changes.items():
        if not math.isfinite(change):
            raise ValueError(f"change of {family}.{layer:02d} is {change}; ranks need finite changes")
    sizes = {layer: abs(change) for layer, change in changes.items()}
    low, high = min(sizes.values()), max(sizes.values())
    if low == high:
        return dict.fromkeys(sizes, ranks[0])
    count = len(ranks)
    return {layer: ranks[min(max(math.ceil((size - low) / (high - low) * count - _NOISE) - 1, 0), count - 1)]
            for layer, size in sizes.items()}


@dataclass(frozen=True)
class PreloraRanks:
    """Algorithm 2 on the changes between the last two windows."""

    r_min: int
    r_max: int
    windows = 2

    @property
    def highest(self) -> int:
        return self.r_max

    def __call__(self, families: Mapping[str, Sequence[int]],
                 windows: Sequence[WindowStats]) -> dict[str, dict[int, int]]:
        changes = changes_by_layer(*windows[-2:])
        chosen = {family: changes[family] for family in families}
        return assign_ranks(chosen, r_min=self.r_min, r_max=self.r_max)
