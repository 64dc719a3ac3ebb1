"""Ranks by the stable rank of each weight, as in Cuttlefish (Wang et al. 2023, arXiv 2305.02538)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prelora_ds.core.rank_rules.settled import without_settled
from prelora_ds.core.spectra import Spectrum
from prelora_ds.core.switch_tests.prelora import WindowStats


@dataclass(frozen=True)
class StableRanks:
    """The larger the stable rank of a weight still is, relative to that of its first value, the larger its adapter.

    Cuttlefish gives a layer the rank xi * stable_rank(W), with xi = rank(W0) / stable_rank(W0), which is the full rank
    before training ("scaled stable rank"). Its layers become products of two factors. An adapter is added to a weight
    that stays, so ``r_max`` takes the place of the full rank here:

        rank = ceil(r_max * stable_rank(W) / stable_rank(W0)), between ``r_min`` and ``r_max``.

    r_min: 0 stands for 1, and gives rank 0 to the layers that have settled.
    settled: in per cent, as in `without_settled`; None without rank 0.
    """

    r_min: int
    r_max: int
    settled: float | None = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"spectra"} if self.settled is None else {"spectra", "norms"})

    @property
    def windows(self) -> int:
        return 1 if self.settled is None else 2

    @property
    def highest(self) -> int:
        return self.r_max

    def __call__(self, families: Mapping[str, Sequence[int]], windows: Sequence[WindowStats],
                 seed: int = 0) -> dict[str, dict[int, int]]:
        spectra = windows[-1].spectra
        ranks = {family: {layer: self._rank(family, layer, spectra[family][layer]) for layer in layers}
                 for family, layers in families.items()}
        return ranks if self.settled is None else without_settled(ranks, windows, self.settled)

    def _rank(self, family: str, layer: int, spectrum: Spectrum) -> int:
        now, first = spectrum.stable_rank, spectrum.first_stable_rank
        if not (math.isfinite(now) and math.isfinite(first)):
            raise ValueError(f"the stable rank of {family}.{layer:02d} went from {first} to {now}, which gives no rank")
        if first == 0:  # a weight that began with zeros
            return self.r_max
        return min(max(math.ceil(self.r_max * now / first), self.r_min, 1), self.r_max)
