"""Rank assignment (PreLoRA, Algorithm 2): layers that still change more get larger adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prelora_ds.core.rank_rules.powers import powers_of_two
from prelora_ds.core.switch_tests.prelora import WindowStats, changes_by_layer

Changes = Literal["abs", "signed"]

# Rounding may put v * n slightly above an integer; that must not select the next rank.
_NOISE = 1e-9


def assign_ranks(changes: Mapping[str, Mapping[int, float]], *, r_min: int, r_max: int,
                 by: Changes = "abs") -> dict[str, dict[int, int]]:
    """PreLoRA, Algorithm 2: give every layer a rank, separately for each family.

    ``changes`` is family -> layer -> norm change between the last two windows. Only its value relative to the smallest
    and largest of the family matters, so the unit is arbitrary. The candidates are the powers of two in
    [``r_min``, ``r_max``]: the smallest change gets ``r_min`` and the largest ``r_max``. If all changes are equal, or
    the family has only one layer, the rank is ``r_min``. Returns family -> layer -> rank.

    by: ``"abs"`` compares the magnitudes of the changes, as the authors' code does; ``"signed"`` compares the changes
    themselves, as the paper writes it, so that a norm that shrinks gets a smaller rank than one that stays.

    Raises ValueError for bounds that are not powers of two or in the wrong order, for a family without layers, for
    changes that are not finite, and for another value of ``by``.
    """
    if by not in ("abs", "signed"):
        raise ValueError(f"by = {by!r} is unknown; choose 'abs' or 'signed'")
    ranks = powers_of_two(r_min, r_max)
    return {family: _ranks_of_family(family, layers, ranks, by) for family, layers in changes.items()}


def _ranks_of_family(family: str, changes: Mapping[int, float], ranks: list[int], by: Changes) -> dict[int, int]:
    if not changes:
        raise ValueError(f"family {family} has no layers")
    for layer, change in changes.items():
        if not math.isfinite(change):
            raise ValueError(f"the change of {family}.{layer:02d} is {change}; Algorithm 2 needs finite changes")
    sizes = {layer: abs(change) if by == "abs" else change for layer, change in changes.items()}
    low = min(sizes.values())
    high = max(sizes.values())
    if low == high:
        return dict.fromkeys(sizes, ranks[0])
    count = len(ranks)

    def rank_of(size: float) -> int:
        part = math.ceil((size - low) / (high - low) * count - _NOISE) - 1
        return ranks[min(max(part, 0), count - 1)]

    return {layer: rank_of(size) for layer, size in sizes.items()}


@dataclass(frozen=True)
class PreloraRanks:
    """Algorithm 2, applied to the changes between the last two windows.

    changes: what is compared, as in `assign_ranks`.
    """

    r_min: int
    r_max: int
    changes: Changes = "abs"
    windows = 2
    needs = frozenset({"norms"})

    @property
    def highest(self) -> int:
        return self.r_max

    def __call__(self, families: Mapping[str, Sequence[int]], windows: Sequence[WindowStats],
                 seed: int = 0) -> dict[str, dict[int, int]]:
        changes = changes_by_layer(*windows[-2:])
        chosen = {family: changes[family] for family in families}
        return assign_ranks(chosen, r_min=self.r_min, r_max=self.r_max, by=self.changes)
