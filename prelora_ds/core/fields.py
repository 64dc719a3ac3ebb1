"""What the config's models are made of."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer


class Duration:
    """A stretch of training: ``"500 steps"``, ``"10 epochs"``, or ``"5 %"`` of the whole run.

    A string and not a mapping, so that an override replaces the unit together with the number.
    """

    _PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|%)\s*")

    def __init__(self, text: str) -> None:
        match = self._PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f'{text!r} is no duration; write "500 steps", "10 epochs" or "5 %"')
        number, unit = match.groups()
        self.value = Fraction(number)
        self.unit: Literal["step", "epoch", "%"] = unit.rstrip("s")  # type: ignore[assignment]
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


def _as_duration(value: Any) -> Duration:
    return value if isinstance(value, Duration) else Duration(value)


def parse_seconds(text: object) -> float:
    """Seconds of ``"6 h"``, ``"90 min"``, ``"30 s"`` or ``"06:00:00"`` (a number is seconds already); above 0.

    Raises ValueError.
    """
    seconds = float(text) if isinstance(text, int | float) else 0.0
    if isinstance(text, str):
        if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(h|min|m|s)\s*", text):
            seconds = float(match[1]) * {"h": 3600, "min": 60, "m": 60, "s": 1}[match[2]]
        elif match := re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", text):
            seconds = 3600.0 * int(match[1]) + 60 * int(match[2]) + int(match[3])
    if seconds <= 0:
        raise ValueError(f'{text!r} is no time; write "6 h", "90 min", "30 s" or "06:00:00"')
    return seconds


Seconds = Annotated[float, BeforeValidator(parse_seconds)]
DurationField = Annotated[Duration, BeforeValidator(_as_duration), PlainSerializer(str)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Strict(BaseModel):
    """Frozen; an unknown key, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False,
                              serialize_by_alias=True)
