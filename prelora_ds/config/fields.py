"""The types of values in the config, and the base class of its sections."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)

from prelora_ds.core.duration import Duration
from prelora_ds.errors import ConfigError


def _as_duration(value: Any) -> Duration:
    return value if isinstance(value, Duration) else Duration(value)


def _recurs(duration: Duration) -> Duration:
    if duration.value == 0:
        raise ValueError(f'{duration} is not an interval; write "1 step" for every step')
    return duration


def _recurs_or_null(duration: Duration) -> Duration:
    if duration.value == 0:
        raise ValueError(f'{duration} is not an interval; write "1 step" for every step, or null for none')
    return duration


def parse_seconds(text: object) -> float:
    """Parse ``"6 h"``, ``"90 min"``, ``"30 s"`` or ``"06:00:00"`` (a number is in seconds already).

    Raises ValueError for any other text, and for a time that is not above 0.
    """
    seconds = float(text) if isinstance(text, int | float) else 0.0
    if isinstance(text, str):
        if match := re.fullmatch(r"\s*((?:0|[1-9][0-9]*)(?:\.[0-9]+)?)\s*(h|min|m|s)\s*", text):
            seconds = float(match[1]) * {"h": 3600, "min": 60, "m": 60, "s": 1}[match[2]]
        elif match := re.fullmatch(r"([0-9]+):([0-5][0-9]):([0-5][0-9])", text):
            seconds = 3600.0 * int(match[1]) + 60 * int(match[2]) + int(match[3])
    if seconds <= 0:
        raise ValueError(f'{text!r} is not a time; write "6 h", "90 min", "30 s" or "06:00:00"')
    return seconds


def _as_text(text: str) -> str:
    if not text or any(ord(character) < 32 for character in text):
        raise ValueError(f"{text!r} is empty or contains a control character")
    return text


def _as_place(text: str) -> str:
    if text.startswith("~"):
        raise ValueError(f'{text!r} begins with "~", which only a shell expands; write the full '
                         "path, with ${oc.env:HOME} in place of ~, or ./~ for a folder with that name")
    longest = max(len(part.encode()) for part in text.split("/"))
    if "://" not in text and (longest > 255 or len(text.encode()) > 4000):
        raise ValueError("is too long for a path: at most 255 bytes between two slashes, and 4000 in total")
    return text


def _as_local(text: str) -> str:
    if "://" in text:
        raise ValueError("is a URL, but must be a path of the file system; name a folder or file, "
                         "for example where the remote store is mounted")
    return text


def parse_walltime(text: str) -> float:
    """Parse the option ``--walltime`` (``6h``, ``90m``, ``06:00:00``) into seconds. Raises ConfigError."""
    try:
        return parse_seconds(text)
    except ValueError as exc:
        raise ConfigError("--walltime", text, "is not a walltime", "write 6h, 90m or 06:00:00") from exc


def parse_duration(text: str | None, option: str) -> Duration | None:
    """Parse the value of ``option`` into a duration longer than 0; None stays None. Raises ConfigError."""
    if text is None:
        return None
    try:
        duration = Duration(text)
    except ValueError as exc:
        raise ConfigError(option, text, str(exc), "write for example '500 steps' or '2 epochs'") from exc
    if duration.value == 0:
        raise ConfigError(option, text, "must be longer than 0", "write for example '2 epochs'")
    return duration


def parse_numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Parse the value of ``option``, numbers above 0 with commas between them; None stays None. Raises ConfigError."""
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise ConfigError(option, text, "is not a list of numbers above 0", f"write for example {option} 0.5,1,2")
    return numbers


@dataclass(frozen=True)
class InWords:
    """How the configuration reference names a type. pydantic ignores it."""

    text: str


Seconds = Annotated[
    float,
    BeforeValidator(parse_seconds),
    InWords("a time"),
]
DurationField = Annotated[
    Duration,
    BeforeValidator(_as_duration),
    PlainSerializer(str),
    InWords("a duration"),
]
Interval = Annotated[DurationField, AfterValidator(_recurs), InWords("a duration > 0")]
IntervalOrNull = Annotated[
    DurationField, AfterValidator(_recurs_or_null), InWords("a duration > 0")
] | None
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, AfterValidator(_as_text)]
Place = Annotated[Text, AfterValidator(_as_place), InWords("a path or URL")]
LocalPlace = Annotated[Place, AfterValidator(_as_local), InWords("a path")]
Seed = Annotated[int, Field(ge=0, lt=2**64)]  # the range that torch.manual_seed accepts


class FieldError(ValueError):
    """An error about one field, raised by a validator of its whole section.

    field: the key within the section, which the message to the user names. value: its value.
    remedy: what the user can do; None stands for another value of the key.
    """

    def __init__(self, field: str, value: Any, problem: str, remedy: str | None = None) -> None:
        super().__init__(problem)
        self.field, self.value, self.remedy = field, value, remedy


def chosen_by(key: str, known: Iterable[str], what: str, example: str) -> tuple[Discriminator, BeforeValidator]:
    """Return the annotations of a section that is one of several, which the value of ``key`` names.

    known: the names. what: as in "is not a test". example: of such a section, for the remedy.

    A plain discriminator would not do: pydantic allows it only for fields without a validator in the mode "before",
    which all fields of `Strict` have, and its own message has no remedy.
    """
    names = list(known)
    listed = ", ".join(names)

    def name_in(section: Any) -> Any:
        return section.get(key) if isinstance(section, dict) else getattr(section, key)

    def check(section: Any) -> Any:
        if isinstance(section, BaseModel):
            return section
        if not isinstance(section, dict):
            raise FieldError("", section, f"is not {what}", f"write it as a mapping, for example {example}")
        if key not in section:
            raise FieldError(key, None, "is required", f"set it to one of {listed}")
        if section[key] not in names:
            near = difflib.get_close_matches(str(section[key]), names, n=1)
            raise FieldError(key, section[key], f"is not {what}; known are {listed}",
                             f"did you mean {near[0]}?" if near else "choose one of them")
        return section

    return Discriminator(name_in), BeforeValidator(check)


class Strict(BaseModel):
    """The base class of all sections.

    It is frozen. An unknown key, NaN, infinity and a value of another type are errors: True is not
    1, and "5" is not 5. Two conversions are made: a float without a fraction may stand for an
    integer, and a list for a tuple.

    The string below a field is its description, from which `prelora_ds.config.reference` makes docs/config.md.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        serialize_by_alias=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_json_has_it(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        kinds = alternatives(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError(f"{str(value).lower()} is not allowed for this key")
        if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
            return int(value)
        return tuple(value) if isinstance(value, list) and tuple in kinds else value


def alternatives(annotation: Any) -> set[Any]:
    """The types that an annotation allows.

    A union allows its parts, and a Literal the types of its values; ``tuple`` and ``dict`` are
    returned without the types of their items.
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return {kind for part in get_args(annotation) for kind in alternatives(part)}
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    return {origin or annotation}


def annotation_at(model: type[BaseModel], place: Sequence[str | int]) -> Any:
    """The annotation of the value at ``place`` in ``model``; None if there is no such key."""
    annotation: Any = model
    for key in place:
        annotation = _inside(annotation, key)
    return annotation


def keys_of(model: type[BaseModel], place: Sequence[str | int], kind: object = None) -> list[str]:
    """The keys of the section at ``place`` in ``model``.

    kind: where that may be one of several sections, the value of a key that only one of them may have.
    """
    sections = sorted(filter(_is_model, alternatives(annotation_at(model, place))), key=lambda each: each.__name__)
    chosen = [section for section in sections
              if any(get_args(field.annotation) == (kind,) for field in section.model_fields.values())]
    return list(dict.fromkeys(field.alias or name for section in chosen or sections
                              for name, field in section.model_fields.items()))


def _inside(annotation: Any, key: str | int) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _inside(arguments[0], key)
    if origin in (Union, types.UnionType):
        inner_annotations = (_inside(part, key) for part in arguments)
        return next((inner for inner in inner_annotations if inner is not None), None)
    if origin is dict:
        return arguments[1]
    if origin is tuple:
        return arguments[0]
    if _is_model(annotation):
        return next((field.annotation for name, field in annotation.model_fields.items()
                     if (field.alias or name) == key), None)
    return None


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
