"""Ranks that hold a share of what each weight has changed since the start of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prelora_ds.core.rank_rules.powers import powers_of_two
from prelora_ds.core.rank_rules.settled import without_settled
from prelora_ds.core.spectra import Spectrum
from prelora_ds.core.switch_tests.prelora import WindowStats

# Spectra are rounded to 6 digits, and a share that is reached but for this rounding is reached.
_NOISE = 1e-6


@dataclass(frozen=True)
class EnergyRanks:
    """The smallest rank whose nearest matrix has ``share`` of |W - W0|_F^2, among the powers of two.

    W0 is the first value of the weight. If no power of two in [``r_min``, ``r_max``] reaches the share, the rank is
    ``r_max``; a weight that has not changed at all gets the smallest rank.

    r_min: 0 stands for 1, and gives rank 0 to the layers that have settled.
    settled: in per cent, as in `without_settled`; None without rank 0.
    """

    share: float
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
        powers = powers_of_two(max(self.r_min, 1), self.r_max)
        ranks = {family: {layer: self._rank(family, layer, spectra[family][layer], powers) for layer in layers}
                 for family, layers in families.items()}
        return ranks if self.settled is None else without_settled(ranks, windows, self.settled)

    def _rank(self, family: str, layer: int, spectrum: Spectrum, powers: Sequence[int]) -> int:
        if not all(map(math.isfinite, spectrum.change)):
            raise ValueError(f"the change of {family}.{layer:02d} since the start of the run is not finite")
        return next((rank for rank in powers if spectrum.held(rank) >= self.share - _NOISE), self.r_max)
