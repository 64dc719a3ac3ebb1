"""What rules that give ranks by singular values have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prelora_ds.core.rank_rules.settled import without_settled
from prelora_ds.core.spectra import Spectrum
from prelora_ds.core.switch_tests.prelora import WindowStats


@dataclass(frozen=True, kw_only=True)
class SpectralRanks(ABC):
    """A rule that gives each layer a rank from the spectrum of its weight in the last window.

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
        ranks = {family: {layer: self.rank(spectra[family][layer], f"{family}.{layer:02d}") for layer in layers}
                 for family, layers in families.items()}
        return ranks if self.settled is None else without_settled(ranks, windows, self.settled)

    @abstractmethod
    def rank(self, spectrum: Spectrum, name: str) -> int:
        """The rank, at least 1. Raises ValueError, with the ``name`` of the layer, if the spectrum gives none."""
