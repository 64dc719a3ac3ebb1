"""Overrides ``a.b=c`` of a recipe, and the ``${...}`` references in both."""

from __future__ import annotations

import json
import re
import shlex
from types import NoneType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prelora_ds.config.changes import new_name
from prelora_ds.config.documents import DEEPEST, Place, UnreadableError, read_scalar, read_value, read_yaml
from prelora_ds.config.fields import alternatives, annotation_at
from prelora_ds.config.tree import Config
from prelora_ds.errors import ConfigError

# An unquoted default, without ${...}, of ${oc.env:NAME,DEFAULT} or ${oc.select:KEY,DEFAULT}.
_DEFAULT = re.compile(
    r"""(?<!\\)((?:\\\\)*\$\{\s*oc\.(?:env|select)\s*:(?:[^{},'"\\$]|\$\{[^{}]*\})+,\s*)"""
    r"""([^\[\]{},'"\\$]*?|\[[^\[\]{}'"\\$]*\])(\s*\})"""
)


def is_text(place: Place) -> bool:
    """Whether the config accepts only a text at ``place``: there 007 and true are texts as well."""
    return alternatives(annotation_at(Config, place)) - {NoneType} == {str}


def override(tree: dict[str, Any], text: str) -> None:
    """Set ``a.b=c`` in ``tree``; a mapping is merged into an existing one.

    A key of an older version is set under its new name. Raises ConfigError.
    """
    key, separator, given = text.partition("=")
    key = new_name(key)
    place = tuple(key.split("."))
    if not separator or not all(place):
        raise ConfigError("override", text, "is not of the form a.b=c",
                          "write, for example, train.log_every=10")
    if len(place) > DEEPEST:
        raise ConfigError("override", text, f"names a key of more than {DEEPEST} levels",
                          "use a shorter key")
    try:
        value = read_value(given, is_text, place)
    except UnreadableError as exc:
        raise ConfigError(key, given, f"cannot be read: {exc}",
                          f"choose a different value for {key}") from exc
    _merge(_section(tree, place, given), place[-1], value)


def swept(text: str) -> list[str]:
    """One override for each value of ``a.b=x,y,z``. Raises ConfigError."""
    key, separator, given = text.partition("=")
    if not separator or not key:
        raise ConfigError("--sweep", text, "is not of the form a.b=x,y,z", "write, for example, convergence.tau=0.5,1")
    try:
        values = read_yaml(f"[{given}]")
    except UnreadableError as exc:
        raise ConfigError("--sweep", text, f"its values cannot be read: {exc}",
                          "separate them by commas, and quote a value that contains one") from exc
    overrides = [shlex.split(as_override(key, value))[0] for value in values]
    if not overrides or len(set(overrides)) < len(overrides):
        raise ConfigError("--sweep", text, "has no values, or one of them twice", "list each value once")
    return overrides


def _section(tree: dict[str, Any], place: tuple[str, ...], given: str) -> dict[str, Any]:
    """The mapping that contains the last key of ``place``; it is created if it does not exist."""
    key = ".".join(place)
    for i in range(1, len(place)):
        section = ".".join(place[:i])
        inner = tree.get(place[i - 1])
        if section == "phases" and (phases := _by_name(inner)):
            if place[i] not in phases or len(place) == i + 1:
                raise ConfigError(key, given, f"the phases of this recipe are {', '.join(phases)}",
                                  "name one of them, and one of its keys")
            tree = phases
            continue

        if section == "phases" and inner is None:
            inner = tree["phases"] = {}
        elif isinstance(inner, list) or (section != "phases" and tuple in alternatives(
                annotation_at(Config, place[:i]))):
            raise ConfigError(key, given, f"{section} is a list, which an override must set as a whole",
                              f"write, for example, {section}=[first,second]")
        if inner is None:
            inner = tree[place[i - 1]] = {}
        if not isinstance(inner, dict):
            raise ConfigError(key, given, f"{section} is {inner!r}, which has no keys",
                              f"remove {section}")
        tree = inner
    return tree


def _by_name(phases: Any) -> dict[str, Any]:
    """The entries of a list of phases by their names; empty for anything else."""
    entries = phases if isinstance(phases, list) else []
    named = [entry for entry in entries if isinstance(entry, dict) and "name" in entry]
    return {str(entry["name"]): entry for entry in named}


def _merge(tree: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(value, dict) and isinstance(tree.get(key), dict):
        for name, inner in value.items():
            _merge(tree[key], name, inner)
    else:
        tree[key] = value


def as_override(key: str, value: Any) -> str:
    """The override that sets ``key`` to ``value``, quoted for a shell."""
    place = tuple(key.split("."))
    try:
        plain = isinstance(value, str) and read_value(value, is_text, place) == value
    except UnreadableError:
        plain = False
    text = value if plain else _quoted(value)
    return shlex.quote(f"{key}={text}")


def _quoted(value: Any) -> str:
    """``value`` as JSON that YAML reads as well: YAML would fold three line breaks that JSON does not escape."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x85\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)


def interpolate(tree: dict[str, Any]) -> dict[str, Any]:
    """``tree`` with its ``${...}`` references resolved by OmegaConf.

    A resolved value is read as if it were written in their place. Raises UnreadableError.
    """
    if not any("${" in text for text in _texts(tree)):
        return tree
    try:
        filled = OmegaConf.to_container(OmegaConf.create(_with_defaults_quoted(tree)), resolve=True)
    except (OmegaConfBaseException, ValueError) as exc:
        raise UnreadableError(str(exc).splitlines()[0]) from exc
    except RecursionError as exc:
        raise UnreadableError("a ${...} reference refers to itself") from exc
    read: dict[str, Any] = _read_filled(tree, filled, ())
    return read


def _with_defaults_quoted(value: Any) -> Any:
    """``value`` with quotes around the defaults in its ``${...}`` references.

    OmegaConf would convert an unquoted default: 1.10 to 1.1, and 2024_11 to 202411.
    """
    if isinstance(value, dict):
        return {key: _with_defaults_quoted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_defaults_quoted(inner) for inner in value]
    return _DEFAULT.sub(_default_quoted, value) if isinstance(value, str) else value


def _default_quoted(match: re.Match[str]) -> str:
    before, default, end = match.groups()
    return match[0] if default in ("null", "Null", "NULL") else f"{before}'{default}'{end}"


def without_interpolation(value: Any) -> Any:
    r"""``value`` with every ``${`` escaped as ``\${``, so that `interpolate` returns the original."""
    if isinstance(value, dict):
        return {key: without_interpolation(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_interpolation(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _read_filled(before: Any, after: Any, at: Place) -> Any:
    if isinstance(before, dict):
        return {key: _read_filled(before[key], after[key], (*at, key)) for key in before}
    if isinstance(before, list):
        return [_read_filled(old, after[i], (*at, i)) for i, old in enumerate(before)]
    if not isinstance(before, str) or "${" not in before:
        return before
    if is_text(at):
        return str(after) if type(after) in (int, float) else after
    return read_scalar(after) if isinstance(after, str) else after


def _texts(value: Any) -> list[str]:
    """All texts in ``value``, however deeply nested."""
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return [text for inner in inside for text in _texts(inner)]
    return [value] if isinstance(value, str) else []
