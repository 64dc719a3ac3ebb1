"""How far a run has come, for tests that do not depend on what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Progress:
    """A run after ``step`` of its ``total_steps`` optimizer steps.

    flops: what these steps have cost. full_flops: what the whole run would cost if all parameters trained. Both are 0
        where no test needs them.
    """

    step: int
    total_steps: int
    flops: int = 0
    full_flops: int = 0


def part_of(share: float, whole: int) -> int:
    """``share`` of ``whole``, rounded up. The share counts as it is written: 0.07 of 100 is 7."""
    return math.ceil(Fraction(repr(share)) * whole)
