"""Lengths of training as a recipe writes them."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Literal, cast


class Duration:
    """A length of training: ``"500 steps"``, ``"10 epochs"``, or ``"5 %"`` of the whole run.

    It is written as a string and not as a mapping, so that an override replaces number and unit together.
    """

    # At most as many digits as `__str__` writes.
    _PATTERN = re.compile(r"\s*((?:0|[1-9][0-9]{0,15})(?:\.[0-9]{1,12})?)\s*(steps?|epochs?|%)\s*")

    def __init__(self, text: str) -> None:
        match = self._PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f'{text!r} is not a duration; write "500 steps", "10 epochs" or "5 %"')
        number, unit = match.groups()
        self.value = Fraction(number)
        self.unit = cast(Literal["step", "epoch", "%"], unit.rstrip("s"))
        if self.unit == "step" and self.value.denominator != 1:
            raise ValueError(f"{text!r}: the number of steps must be an integer")
        if self.unit == "%" and self.value > 100:
            raise ValueError(f"{text!r}: must be at most 100 %")

    def __str__(self) -> str:
        # The format "g" of a float would round to six digits and write 1000000 as 1e+06.
        number = f"{Decimal(self.value.numerator) / self.value.denominator:f}"
        if self.unit == "%":
            return f"{number} %"
        plural = "" if number == "1" else "s"
        return f"{number} {self.unit}{plural}"

    def __repr__(self) -> str:
        return f"Duration({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and (self.value, self.unit) == (other.value, other.unit)

    def __hash__(self) -> int:
        return hash((self.value, self.unit))
