"""The overrides ``a.b=c`` of a recipe, and the ``${...}`` in both."""

from __future__ import annotations

import json
import re
import shlex
from types import NoneType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prelora_ds.config.changes import new_name
from prelora_ds.config.documents import DEEPEST, Place, UnreadableError, read_scalar, read_value
from prelora_ds.config.fields import alternatives, annotation_at
from prelora_ds.config.tree import Config
from prelora_ds.errors import ConfigError

# The default of ${oc.env:NAME,DEFAULT} and ${oc.select:KEY,DEFAULT}, where it is written without quotes and ${...}.
_DEFAULT = re.compile(
    r"""(?<!\\)((?:\\\\)*\$\{\s*oc\.(?:env|select)\s*:(?:[^{},'"\\$]|\$\{[^{}]*\})+,\s*)"""
    r"""([^\[\]{},'"\\$]*?|\[[^\[\]{}'"\\$]*\])(\s*\})"""
)


def is_text(place: Place) -> bool:
    """Whether the config takes only a text at ``place``, where 007 or true is one as well."""
    return alternatives(annotation_at(Config, place)) - {NoneType} == {str}


def override(tree: dict[str, Any], text: str) -> None:
    """Put ``a.b=c`` into ``tree``; a mapping is merged with the one that is there.

    A key of an older version is put under its name of today. Raises ConfigError.
    """
    key, separator, given = text.partition("=")
    key = new_name(key)
    place = tuple(key.split("."))
    if not separator or not all(place):
        raise ConfigError("override", text, "is not of the form a.b=c",
                          "write for example train.log_every=10")
    if len(place) > DEEPEST:
        raise ConfigError("override", text, f"names a key of more than {DEEPEST} levels",
                          "name a shorter one")
    try:
        value = read_value(given, is_text, place)
    except UnreadableError as exc:
        raise ConfigError(key, given, f"cannot be read: {exc}",
                          f"give {key} another value") from exc
    _merge(_section(tree, place, given), place[-1], value)


def _section(tree: dict[str, Any], place: tuple[str, ...], given: str) -> dict[str, Any]:
    """The mapping that holds the last key of ``place``; made where there is none."""
    key = ".".join(place)
    for i in range(1, len(place)):
        held, below = ".".join(place[:i]), tree.get(place[i - 1])
        if held == "phases" and (phases := _by_name(below)):
            if place[i] not in phases or len(place) == i + 1:
                raise ConfigError(key, given, f"the phases of this recipe are {', '.join(phases)}",
                                  "name one of them, and a key of it")
            tree = phases
            continue
        if held == "phases" and below is None:
            below = tree["phases"] = {}
        elif isinstance(below, list) or (held != "phases" and tuple in alternatives(
                annotation_at(Config, place[:i]))):
            raise ConfigError(key, given, f"{held} is a list, which an override gives as a whole",
                              f"write for example {held}=[first,second]")
        if below is None:
            below = tree[place[i - 1]] = {}
        if not isinstance(below, dict):
            raise ConfigError(key, given, f"{held} is {below!r}, which holds no keys",
                              f"leave {held} out")
        tree = below
    return tree


def _by_name(phases: Any) -> dict[str, Any]:
    """The entries of a list of phases by their names."""
    entries = phases if isinstance(phases, list) else []
    return {str(entry["name"]): entry for entry in entries if isinstance(entry, dict) and "name" in entry}


def _merge(tree: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(value, dict) and isinstance(tree.get(key), dict):
        for name, inner in value.items():
            _merge(tree[key], name, inner)
    else:
        tree[key] = value


def as_override(key: str, value: Any) -> str:
    """What a shell takes as the override that gives ``value`` to ``key``."""
    place = tuple(key.split("."))
    try:
        plain = isinstance(value, str) and read_value(value, is_text, place) == value
    except UnreadableError:
        plain = False
    text = value if plain else _quoted(value)
    return shlex.quote(f"{key}={text}")


def _quoted(value: Any) -> str:
    """``value`` as JSON that YAML reads alike: it folds three line breaks that JSON leaves as they are."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x85\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def interpolate(tree: dict[str, Any]) -> dict[str, Any]:
    """``tree`` with its ``${...}`` filled in by OmegaConf; what they give is read as if it stood
    there.

    Raises UnreadableError.
    """
    if not any("${" in text for text in _texts(tree)):
        return tree
    try:
        filled = OmegaConf.to_container(OmegaConf.create(_with_defaults_quoted(tree)), resolve=True)
    except (OmegaConfBaseException, ValueError) as exc:
        raise UnreadableError(str(exc).splitlines()[0]) from exc
    except RecursionError as exc:
        raise UnreadableError("a ${...} leads back to itself") from exc
    read: dict[str, Any] = _read_filled(tree, filled, ())
    return read


def _with_defaults_quoted(value: Any) -> Any:
    """``value`` with quotes around the defaults in its ``${...}``.

    OmegaConf would read a bare one as a value and write that: 1.1 for 1.10, and 202411 for 2024_11.
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
    r"""``value`` with ``\${`` for ``${`` in its texts, so that `interpolate` gives them back."""
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
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return [text for inner in inside for text in _texts(inner)]
    return [value] if isinstance(value, str) else []
