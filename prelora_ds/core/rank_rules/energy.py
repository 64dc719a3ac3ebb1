"""Ranks that hold a share of what each weight has changed since the start of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prelora_ds.core.rank_rules.powers import powers_of_two
from prelora_ds.core.rank_rules.spectral import SpectralRanks
from prelora_ds.core.spectra import Spectrum

# Spectra are rounded to 6 digits, and a share that is reached but for this rounding is reached.
_NOISE = 1e-6


@dataclass(frozen=True, kw_only=True)
class EnergyRanks(SpectralRanks):
    """The smallest rank whose nearest matrix has ``share`` of |W - W0|_F^2, among the powers of two.

    W0 is the first value of the weight. If no power of two in [``r_min``, ``r_max``] reaches the share, the rank is
    ``r_max``; a weight that has not changed at all gets the smallest rank.
    """

    share: float

    def rank(self, spectrum: Spectrum, name: str) -> int:
        if not all(map(math.isfinite, spectrum.change)):
            raise ValueError(f"the change of {name} since the start of the run is not finite")
        powers = powers_of_two(max(self.r_min, 1), self.r_max)
        return next((rank for rank in powers if spectrum.held(rank) >= self.share - _NOISE), self.r_max)
