"""Stretches of training, in the words of a recipe."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Literal, cast


class Duration:
    """A stretch of training: ``"500 steps"``, ``"10 epochs"``, or ``"5 %"`` of the whole run.

    A string and not a mapping, so that an override replaces the unit together with the number.
    """

    # So few digits that `__str__` writes them all.
    _PATTERN = re.compile(r"\s*((?:0|[1-9][0-9]{0,15})(?:\.[0-9]{1,12})?)\s*(steps?|epochs?|%)\s*")

    def __init__(self, text: str) -> None:
        match = self._PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f'{text!r} is not a duration; write "500 steps", "10 epochs" or "5 %"')
        number, unit = match.groups()
        self.value = Fraction(number)
        self.unit = cast(Literal["step", "epoch", "%"], unit.rstrip("s"))
        if self.unit == "step" and self.value.denominator != 1:
            raise ValueError(f"{text!r}: a number of steps is whole")
        if self.unit == "%" and self.value > 100:
            raise ValueError(f"{text!r}: a share is at most 100 %")

    def __str__(self) -> str:
        # Not float's "g", which rounds to six digits and writes 1000000 as 1e+06.
        number = f"{Decimal(self.value.numerator) / self.value.denominator:f}"
        return f"{number} %" if self.unit == "%" else f"{number} {self.unit}{'' if number == '1' else 's'}"

    def __repr__(self) -> str:
        return f"Duration({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and (self.value, self.unit) == (other.value, other.unit)

    def __hash__(self) -> int:
        return hash((self.value, self.unit))
