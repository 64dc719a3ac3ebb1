"""Rules that give each adapter its rank when a phase begins. Each rule has its own module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from prelora_ds.core.rank_rules.energy import EnergyRanks
from prelora_ds.core.rank_rules.prelora import PreloraRanks
from prelora_ds.core.rank_rules.random import RandomRanks
from prelora_ds.core.rank_rules.stable_rank import StableRanks
from prelora_ds.core.rank_rules.uniform import UniformRank
from prelora_ds.core.switch_tests.prelora import WindowStats

Families = Mapping[str, Sequence[int]]  # family -> its layers


class RankRule(Protocol):
    """A rule with its parameters, as a recipe selects it in `phases.*.adapters.ranks`.

    windows: how many closed windows it needs.
    highest: the largest rank that it can give.
    needs: which measurements of an `Observation` it depends on.
    """

    @property
    def windows(self) -> int: ...

    @property
    def highest(self) -> int: ...

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, families: Families, windows: Sequence[WindowStats],
                 seed: int = 0) -> Mapping[str, Mapping[int, int]]:
        """Family -> layer -> rank; 0 means no adapter. Raises ValueError if the windows do not determine the ranks.

        seed: of the run, for rules that draw.
        """
        ...


RANK_RULES: dict[str, Callable[..., RankRule]] = {
    "prelora": PreloraRanks,
    "uniform": UniformRank,
    "random": RandomRanks,
    "stable_rank": StableRanks,
    "energy": EnergyRanks,
}
