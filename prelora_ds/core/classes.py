"""Class names: what the labels 0, 1, ... stand for, and how two lists of classes differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def unnamed(count: int) -> tuple[str, ...]:
    """Default names for ``count`` classes without known names, the same as those of transformers."""
    return tuple(f"LABEL_{label}" for label in range(count))


def classes_of(document: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The classes in a checkpoint's state.json, or None if it does not contain any.

    A checkpoint of an earlier version contains only the number of classes.
    """
    if "classes" in document:
        return tuple(map(str, document["classes"]))
    return unnamed(document["num_labels"]) if "num_labels" in document else None


def difference(classes: Sequence[str], other: Sequence[str], whose: str) -> str | None:
    """Describe how ``classes`` differ from ``other``, the classes of ``whose``; None if they are the same.

    Names are compared only if both lists have known names.
    """
    if len(classes) != len(other):
        return f"has {len(classes)} classes, but {whose} has {len(other)}"
    if unnamed(len(classes)) in (tuple(classes), tuple(other)):
        return None
    for label, (name, other_name) in enumerate(zip(classes, other, strict=True)):
        if name != other_name:
            return f"has {name!r} as class {label}, but {whose} has {other_name!r}"
    return None
