"""Ranks by the stable rank of each weight, as in Cuttlefish (Wang et al. 2023, arXiv 2305.02538)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prelora_ds.core.rank_rules.spectral import SpectralRanks
from prelora_ds.core.spectra import Spectrum


@dataclass(frozen=True, kw_only=True)
class StableRanks(SpectralRanks):
    """The larger the stable rank of a weight still is, relative to that of its first value, the larger its adapter.

    Cuttlefish gives a layer the rank xi * stable_rank(W), with xi = rank(W0) / stable_rank(W0), which is the full rank
    before training ("scaled stable rank"). Its layers become products of two factors. An adapter is added to a weight
    that stays, so ``r_max`` takes the place of the full rank here:

        rank = ceil(r_max * stable_rank(W) / stable_rank(W0)), between ``r_min`` and ``r_max``.
    """

    def rank(self, spectrum: Spectrum, name: str) -> int:
        now, first = spectrum.stable_rank, spectrum.first_stable_rank
        if not (math.isfinite(now) and math.isfinite(first)):
            raise ValueError(f"the stable rank of {name} went from {first} to {now}, which gives no rank")
        if first == 0:  # a weight that began with zeros
            return self.r_max
        return min(max(math.ceil(self.r_max * now / first), self.r_min, 1), self.r_max)
