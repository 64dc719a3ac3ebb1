"""Strict reading of YAML and JSON: a value means what its text means in YAML 1.2 or JSON, otherwise it is refused.

YAML is read by the core schema of version 1.2. PyYAML itself follows version 1.1, in which `on` is
true, `0100` is 64, `1:30` is 90 and `2024-11-25` is a date; of two equal keys it keeps the last.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import yaml

Place = tuple[str | int, ...]  # the keys, and the indices of lists, that lead to a value
DEEPEST = 32  # the largest number of nested levels in a document
LONGEST = 100_000  # the largest number of values in a document; each repetition by an alias counts

_NULL = frozenset(("", "~", "null", "Null", "NULL"))
_BOOLEAN = {
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
# Numbers that YAML readers interpret differently, or that JSON does not have.
_DOUBTFUL = re.compile(
    r"[-+]?(0[0-9_]+(\.[0-9_]*)?([eE][-+]?[0-9]+)?|0[xXoObB][0-9a-fA-F_]+|\.(inf|nan))", re.I
)
_LINE_END = re.compile("[\x85\u2028\u2029]")
_UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


class UnreadableError(ValueError):
    """A text that cannot be read. The message gives place and reason in one line."""


def nothing_is_text(place: Place) -> bool:
    return False


def read_yaml(text: str, is_text: Callable[[Place], bool] = nothing_is_text, at: Place = ()) -> Any:
    """The value of a YAML 1.2 document; tags are refused, and keys stay as they are written.

    is_text: whether the value at a place is a text; an unquoted scalar there stays as it is
    written, unless it is null.
    at: the place of the whole document.

    Raises UnreadableError.
    """
    try:
        for token in yaml.scan(text, Loader=_Loader):
            if isinstance(token, yaml.TagToken):
                _refuse(token.start_mark, "tags (!...) are not supported")
        root = yaml.compose(text, Loader=_Loader)
        value = None if root is None else _Builder(is_text).value(root, at, 0)
    except yaml.MarkedYAMLError as exc:
        cause = ", ".join(part for part in (exc.context, exc.problem) if part)
        raise UnreadableError(
            f"{_position(exc.problem_mark or exc.context_mark)}: {cause}"
        ) from exc
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        raise UnreadableError(
            f"line {line}: the character {chr(exc.character)!r} is not allowed"
        ) from exc
    except RecursionError as exc:
        raise UnreadableError(f"is nested more than {DEEPEST} levels deep") from exc
    check_plain(value)
    return value


def read_scalar(text: str) -> Any:
    """Convert a scalar by YAML's core schema: to None, a boolean, a number or the text itself.

    Raises UnreadableError for a number that is not decimal, has leading zeros or is not finite,
    because YAML readers disagree about those.
    """
    if text in _NULL:
        return None
    if text in _BOOLEAN:
        return _BOOLEAN[text]
    if _DOUBTFUL.fullmatch(text):
        raise UnreadableError(
            f"{text} is a number that YAML readers interpret differently; write a finite decimal "
            "number without leading zeros, or put quotes around a text"
        )
    if _INTEGER.fullmatch(text):
        return _integer(text)
    return _finite(text) if _FLOAT.fullmatch(text) else text


def read_value(text: str, is_text: Callable[[Place], bool], at: Place) -> Any:
    """The value of an override for the key at ``at``.

    The text is a scalar, with or without quotes, or a list or mapping in brackets. Raises
    UnreadableError.
    """
    if not text:
        raise UnreadableError("has no value; write null for none, or '\"\"' for an empty text")
    if text[0] in "'\"" or (text[0] in "[{" and not is_text(at)):
        return read_yaml(text, is_text, at)
    if is_text(at):
        value: Any = None if text in _NULL - {"~"} else text
    else:
        value = read_scalar(text.strip())
    check_plain(value)
    return value


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises UnreadableError, also for a key that occurs twice, and for values that Python accepts
    although JSON does not have them: NaN, Infinity, and numbers that overflow a float.
    """
    try:
        value = json.loads(
            text.removeprefix("\ufeff"),
            object_pairs_hook=_without_duplicates,
            parse_float=_finite,
            parse_int=_integer,
            parse_constant=_finite,
        )
    except RecursionError as exc:
        raise UnreadableError(f"is nested more than {DEEPEST} levels deep") from exc
    except json.JSONDecodeError as exc:
        raise UnreadableError(str(exc)) from exc
    check_plain(value)
    return value


def write_yaml(values: Mapping[str, Any]) -> str:
    """Write YAML from which `read_yaml`, and readers of YAML 1.1, get equal values."""
    return yaml.dump(dict(values), Dumper=_Dumper, allow_unicode=True, sort_keys=False)


def check_plain(value: Any, depth: int = 0) -> None:
    """Raise UnreadableError for a text that a file cannot contain, and for values nested too deeply."""
    if depth > DEEPEST:
        raise UnreadableError(f"is nested more than {DEEPEST} levels deep")
    if isinstance(value, str) and (match := _UNWRITABLE.search(value)):
        raise UnreadableError(
            f"the text {value!r} contains the character {match[0]!r}, which a file cannot contain"
        )
    if isinstance(value, Mapping):
        for key in value:
            check_plain(key, depth + 1)
            check_plain(value[key], depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_plain(item, depth + 1)


class _Loader(yaml.SafeLoader):
    """Composes nodes. An unquoted scalar stays a text until `_Builder` converts it."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML declares it so)


class _Builder:
    """Builds the values of one document from its nodes."""

    def __init__(self, is_text: Callable[[Place], bool]) -> None:
        self._is_text = is_text
        self._count = 0

    def value(self, node: yaml.Node, at: Place, depth: int) -> Any:
        self._count += 1
        if depth > DEEPEST:
            _refuse(node.start_mark, f"is nested more than {DEEPEST} levels deep")
        if self._count > LONGEST:
            raise UnreadableError(f"the document contains more than {LONGEST:,} values")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, at, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*at, i), depth + 1) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode), "YAML has no other kind of node"
        if node.style is not None:  # quoted, or a block scalar
            return node.value
        if self._is_text(at):
            return None if node.value in _NULL else node.value
        try:
            return read_scalar(node.value)
        except UnreadableError as exc:
            _refuse(node.start_mark, str(exc))

    def _mapping(self, node: yaml.MappingNode, at: Place, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse(key.start_mark, "a key must be a text, but this one is a list or a mapping")
            if key.value in values:
                _refuse(
                    key.start_mark,
                    f"the key {key.value!r} occurs twice (first in line {lines[key.value]})",
                )
            if key.value == "<<" and key.style is None:
                _refuse(key.start_mark, "`<<` is not part of YAML 1.2; write the keys themselves")
            lines[key.value] = key.start_mark.line + 1
            values[key.value] = self.value(value, (*at, key.value), depth + 1)
        return values


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Write a text, in quotes where `read_scalar` would not read it as a text.

    PyYAML itself adds the quotes that YAML 1.1 needs. It takes some characters for the end of a
    line, and only double quotes escape those.
    """
    if _LINE_END.search(text):
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
    try:
        style = None if read_scalar(text) == text else "'"
    except UnreadableError:
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise UnreadableError(f"the key {key!r} occurs twice")
        values[key] = value
    return values


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as exc:
        raise UnreadableError("contains a number with more digits than Python reads") from exc


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise UnreadableError(f"{text} is not a finite number")
    return number


def _position(mark: yaml.Mark | None) -> str:
    return "the text" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}"


def _refuse(mark: yaml.Mark, problem: str) -> NoReturn:
    raise UnreadableError(f"{_position(mark)}: {problem}")
