"""Random ranks, the control of Algorithm 2: does it matter which layer gets which rank?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from prelora_ds.core.rank_rules.powers import powers_of_two
from prelora_ds.core.rank_rules.prelora import PreloraRanks
from prelora_ds.core.switch_tests.prelora import WindowStats

Draw = Literal["independent", "permuted"]


@dataclass(frozen=True)
class RandomRanks:
    """Ranks that are drawn from the seed of the run.

    draw: ``"independent"`` gives each adapter a power of two in [``r_min``, ``r_max``] with equal probability.
        ``"permuted"`` deals the ranks that Algorithm 2 gives to the layers of a family out among them at random. Their
        mean stays the same, and so does the number of parameters, if the linears of a family have equal shapes.

    The draw depends on the seed and the family only, so it is the same at every world size and after a resume.
    """

    r_min: int
    r_max: int
    draw: Draw = "independent"

    @property
    def needs(self) -> frozenset[str]:
        return PreloraRanks.needs if self.draw == "permuted" else frozenset()

    @property
    def windows(self) -> int:
        return PreloraRanks.windows if self.draw == "permuted" else 0

    @property
    def highest(self) -> int:
        return self.r_max

    def __call__(self, families: Mapping[str, Sequence[int]], windows: Sequence[WindowStats],
                 seed: int = 0) -> dict[str, dict[int, int]]:
        if self.draw == "permuted":
            ranks = PreloraRanks(self.r_min, self.r_max)(families, windows)
            return {family: _permuted(layers, Random(f"{seed}/ranks/{family}")) for family, layers in ranks.items()}

        powers = powers_of_two(self.r_min, self.r_max)
        chosen = {}
        for family, layers in families.items():
            rng = Random(f"{seed}/ranks/{family}")
            chosen[family] = {layer: rng.choice(powers) for layer in sorted(layers)}
        return chosen


def _permuted(ranks: Mapping[int, int], rng: Random) -> dict[int, int]:
    layers = sorted(ranks)
    return dict(zip(layers, rng.sample([ranks[layer] for layer in layers], len(layers)), strict=True))
