"""Convert dataclasses to JSON and back, by their type annotations.

JSON has neither NaN nor infinities, and all its keys are strings. So NaN is written as null, an
infinity as the string "Infinity" or "-Infinity", and an integer key as its decimal digits. Every
other float is restored bit for bit.

A class whose stored form has changed may define ``to_json(self)`` and ``from_json(cls, data)``
itself; the codec calls them wherever such a value occurs. They use `fields_to_json` and
`fields_from_json`, which ignore these two methods of the class they are given.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf}


class CodecError(ValueError):
    """JSON that does not fit the annotation of a field.

    path: the dotted path of that field within the value that is read; empty for the value itself.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)  # both, so that the error can be pickled for other ranks
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"{self.path or 'the value'} {self.problem}"


def to_json(value: object) -> Any:
    """Convert ``value`` to plain JSON types.

    A dataclass becomes a mapping of its fields, a tuple becomes a list, and a set a sorted list.
    Raises TypeError for a value of any other class.
    """
    custom = getattr(value, "to_json", None)
    if custom is not None:
        return custom()
    if is_dataclass(value):
        return fields_to_json(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return _float_to_json(value)
    if isinstance(value, str):
        return str(value)  # converts a StrEnum to its text
    if isinstance(value, Mapping):
        return {_key_to_json(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(map(to_json, value))
    if isinstance(value, list | tuple):
        return list(map(to_json, value))
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: {value!r}")


def from_json(cls: type[T], data: object) -> T:
    """Restore the ``cls`` from which `to_json` made ``data``.

    A missing field gets its default: the data was written by an older version that did not have the
    field. A key that is not a field is refused: a later version wrote it, and a run that ignored it
    could silently train differently.

    Two values are not restored: NaN in a ``float | None`` becomes None, and an infinity in a
    ``float | str`` becomes a text. Raises CodecError, a ValueError, for data that does not fit.
    """
    value: T = _read(cls, data, "")
    return value


def fields_to_json(value: Any) -> dict[str, Any]:
    """Convert the fields of a dataclass, each by `to_json`."""
    return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}


def fields_from_json(cls: type[T], data: object) -> T:
    """Make a dataclass from the fields in ``data``, each read by `from_json`. Raises CodecError."""
    value: T = _read_fields(cls, data, "")
    return value


def _float_to_json(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(value)


def _key_to_json(key: object) -> str:
    if isinstance(key, str):
        return str(key)
    if isinstance(key, int) and not isinstance(key, bool):
        return str(int(key))
    raise TypeError(f"{key!r} cannot be a key in JSON")


@cache
def _annotations(cls: Any) -> dict[str, Any]:
    """The annotation of each field. Cached, because evaluating the annotations is slow."""
    return get_type_hints(cls)


def _read(annotation: Any, data: object, path: str) -> Any:
    """Read ``data`` as a value of ``annotation``, which is at ``path``."""
    custom = getattr(annotation, "from_json", None) if isinstance(annotation, type) else None
    if custom is not None:
        return _read_by_its_class(custom, data, path)
    if is_dataclass(annotation):
        return _read_fields(annotation, data, path)
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return _read_enum(annotation, data, path)
    if annotation in _SCALARS:
        return _SCALARS[annotation](data, path)
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin in (Union, types.UnionType):
        return _read_union(arguments, data, path)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _read_mapping(arguments, data, path)
    if origin is tuple:
        return _read_tuple(arguments, data, path)
    if origin in (list, frozenset):
        return origin(_read_items(arguments[0], data, path))
    raise TypeError(f"the annotation {annotation!r} at {path!r} cannot be written as JSON")


def _read_by_its_class(from_json: Callable[[object], Any], data: object, path: str) -> Any:
    try:
        return from_json(data)
    except CodecError as error:
        raise CodecError(_join(path, error.path), error.problem) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CodecError(path, f"cannot be parsed ({error!r})") from error


def _read_fields(cls: Any, data: object, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise _unfit(path, data, f"the fields of a {cls.__name__}")
    known = {field.name: field for field in fields(cls)}
    for key in data:
        if key not in known:
            raise CodecError(_join(path, str(key)), f"is not a field of {cls.__name__}; "
                             "did a later version of prelora_ds write it?")
    annotations = _annotations(cls)
    values = {}
    for name, field in known.items():
        if name in data:
            values[name] = _read(annotations[name], data[name], _join(path, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise CodecError(_join(path, name), "is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise CodecError(path, str(error)) from error


def _read_enum(enum: type[StrEnum], data: object, path: str) -> StrEnum:
    members = {str(member): member for member in enum}
    if isinstance(data, str) and data in members:
        return members[data]
    raise _unfit(path, data, f"one of {', '.join(members)}")


def _read_union(parts: Sequence[Any], data: object, path: str) -> Any:
    """Read ``data`` as the first part that fits: None, then the scalars, then the one that is neither."""
    if data is None and types.NoneType in parts:
        return None
    for scalar, read in _SCALARS.items():
        if scalar in parts:
            with suppress(CodecError):
                return read(data, path)
    others = [part for part in parts if part is not types.NoneType and part not in _SCALARS]
    if len(others) == 1:
        return _read(others[0], data, path)
    if others:
        raise TypeError(f"{' and '.join(map(str, others))} at {path!r} cannot be distinguished in JSON")
    raise _unfit(path, data, " or ".join(part.__name__ for part in parts))


def _read_mapping(arguments: Sequence[Any], data: object, path: str) -> dict[Any, Any]:
    if not isinstance(data, Mapping):
        raise _unfit(path, data, "a mapping")
    key_type, item_type = arguments
    return {_read_key(key_type, key, path): _read(item_type, item, _join(path, str(key)))
            for key, item in data.items()}


def _read_key(key_type: Any, key: object, path: str) -> Any:
    if key_type is not int:
        return _read(key_type, key, _join(path, str(key)))
    with suppress(ValueError):
        if str(number := int(str(key))) == key:
            return number
    raise _unfit(path, key, "an integer as its key")


def _read_tuple(arguments: Sequence[Any], data: object, path: str) -> tuple[Any, ...]:
    if arguments[-1] is Ellipsis:
        return tuple(_read_items(arguments[0], data, path))
    if not isinstance(data, list | tuple) or len(data) != len(arguments):
        raise _unfit(path, data, f"a list of {len(arguments)}")
    return tuple(_read(part, item, _join(path, str(i)))
                 for i, (part, item) in enumerate(zip(arguments, data, strict=True)))


def _read_items(annotation: Any, data: object, path: str) -> list[Any]:
    if not isinstance(data, list | tuple):
        raise _unfit(path, data, "a list")
    return [_read(annotation, item, _join(path, str(i))) for i, item in enumerate(data)]


def _read_float(data: object, path: str) -> float:
    if data is None:
        return math.nan
    if isinstance(data, str) and data in INFINITIES:
        return INFINITIES[data]
    if isinstance(data, int | float) and not isinstance(data, bool):
        with suppress(OverflowError):
            return float(data)
    raise _unfit(path, data, "a number")


def _read_int(data: object, path: str) -> int:
    if isinstance(data, int) and not isinstance(data, bool):
        return data
    raise _unfit(path, data, "an integer")


def _read_bool(data: object, path: str) -> bool:
    if isinstance(data, bool):
        return data
    raise _unfit(path, data, "true or false")


def _read_str(data: object, path: str) -> str:
    if isinstance(data, str):
        return data
    raise _unfit(path, data, "a text")


# In the order in which a union tries them: a float also accepts integers, null and two texts.
_SCALARS: Mapping[Any, Callable[[object, str], Any]] = {
    bool: _read_bool, int: _read_int, str: _read_str, float: _read_float}


def _unfit(path: str, data: object, expected: str) -> CodecError:
    shown = repr(data)
    if len(shown) > 80:
        shown = f"{shown[:77]}..."
    return CodecError(path, f"is {shown}, and not {expected}")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key
