"""What an observation tells about the singular values of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Spectrum:
    """The singular values of an effective weight W, and of its change since its first value W0, in a few numbers.

    stable_rank: |W|_F^2 / |W|_2^2, the sum of the squared singular values over the largest of them.
    first_stable_rank: the same of W0.
    change: the shares of |W - W0|_F^2 that the 1, 2, 4, 8, ... largest singular values of W - W0 have together, for
        each power of two below the number of singular values. Empty if W is W0.
    """

    stable_rank: float
    first_stable_rank: float
    change: tuple[float, ...]

    def held(self, rank: int) -> float:
        """The share of |W - W0|_F^2 that the nearest matrix of this ``rank``, a power of two, has.

        This is 1 minus the squared relative error of that matrix (Eckart and Young 1936).
        """
        index = rank.bit_length() - 1
        return self.change[index] if index < len(self.change) else 1.0


Spectra = Mapping[str, Mapping[int, Spectrum]]  # family -> layer -> its spectrum
