"""One rank for all adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prelora_ds.core.switch_tests.prelora import WindowStats


@dataclass(frozen=True)
class UniformRank:
    """A rule that gives every adapter the same ``rank``."""

    rank: int
    windows = 0
    needs = frozenset[str]()

    @property
    def highest(self) -> int:
        return self.rank

    def __call__(self, families: Mapping[str, Sequence[int]], windows: Sequence[WindowStats],
                 seed: int = 0) -> dict[str, dict[int, int]]:
        return {family: dict.fromkeys(layers, self.rank) for family, layers in families.items()}
