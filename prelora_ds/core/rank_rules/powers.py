"""The ranks among which a rule chooses: powers of two."""

from __future__ import annotations


def powers_of_two(r_min: int, r_max: int) -> list[int]:
    """Return the powers of two in [``r_min``, ``r_max``], ascending.

    Raises ValueError for bounds that are not powers of two themselves, and for bounds in the wrong order.
    """
    for name, rank in (("r_min", r_min), ("r_max", r_max)):
        if rank < 1 or rank & (rank - 1):
            raise ValueError(f"{name} {rank} is not a power of two, but the ranks are chosen among powers of two")
    if r_min > r_max:
        raise ValueError(f"r_min {r_min} is larger than r_max {r_max}")
    return [1 << exponent for exponent in range(r_min.bit_length() - 1, r_max.bit_length())]
