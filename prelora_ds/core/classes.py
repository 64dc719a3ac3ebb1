"""Class names: what the labels 0, 1, ... stand for, and whether two sets of them are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def unnamed(count: int) -> tuple[str, ...]:
    """Names for ``count`` classes whose names are not known, as transformers makes them."""
    return tuple(f"LABEL_{label}" for label in range(count))


def classes_of(document: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The classes in a checkpoint's state.json; None where it tells nothing of them.

    Checkpoints of earlier versions tell only how many there are.
    """
    if "classes" in document:
        return tuple(map(str, document["classes"]))
    return unnamed(document["num_labels"]) if "num_labels" in document else None


def difference(own: Sequence[str], other: Sequence[str], whose: str) -> str | None:
    """In words, how ``own`` differs from ``other``, the classes of ``whose``; None where they are the same.

    Names are compared only where both are known.
    """
    if len(own) != len(other):
        return f"has {len(own)} classes, and {whose} has {len(other)}"
    if unnamed(len(own)) in (tuple(own), tuple(other)):
        return None
    for label, (mine, theirs) in enumerate(zip(own, other, strict=True)):
        if mine != theirs:
            return f"has {mine!r} as its class {label}, and {whose} has {theirs!r}"
    return None
