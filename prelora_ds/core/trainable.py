"""The parameters that a phase trains, named by sets or regular expressions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set

from prelora_ds.core.adapters import AdapterSpec, kind_of
from prelora_ds.core.layout import Layout

SETS = ("adapters", "head", "norms", "biases", "embeddings", "rest")


def trainable_names(train: Sequence[str], layout: Layout, adapters: Mapping[str, AdapterSpec],
                    unadapted: frozenset[str] = frozenset()) -> frozenset[str]:
    """The parameters named by ``train``: each entry is ``all``, one of `SETS`, or a regular expression.

    all: every parameter of the model, and every leaf of an adapter that its kind trains.
    adapters: only these leaves.
    head: what the module defines after its last block, except norms.
    embeddings: what the module defines before its first block.
    norms: weight and bias of every LayerNorm (its weight has one dimension).
    biases: every parameter called ``bias``.
    rest: everything that does not belong to a linear with an adapter, or to one that a rule has left without
        (``unadapted``).

    A regular expression must match the whole name of a parameter. Raises ValueError for an invalid expression, and if
    an expression, or a set other than ``rest``, matches no parameter.
    """
    leaves = {f"{path}.{leaf}" for path, spec in adapters.items()
              for leaf in kind_of(spec).parameters(layout.parameters[f"{path}.weight"], spec)
              if leaf in kind_of(spec).trains(spec)}
    names: set[str] = set()
    for name in train:
        matches = _names_of(name, layout, adapters.keys() | unadapted, leaves)
        if not matches and name != "rest":  # which is empty if every linear has an adapter
            raise ValueError(f"{name!r} matches no parameter of this model")
        names |= matches
    return frozenset(names)


def _names_of(name: str, layout: Layout, linears: Set[str], leaves: set[str]) -> set[str]:
    """The parameters that one entry names. linears: those that ``rest`` leaves out. leaves: those of adapters."""
    base = set(layout.parameters)
    norms = {f"{path}.{leaf}" for path in _norms(layout) for leaf in ("weight", "bias")} & base
    if name == "all":
        return base | leaves
    if name == "adapters":
        return leaves
    if name == "norms":
        return norms
    if name == "biases":
        return {key for key in base if key.endswith(".bias")}
    if name == "embeddings":
        return set(layout.before_blocks())
    if name == "head":
        return set(layout.after_blocks()) - norms
    if name == "rest":
        return base - {f"{path}.{leaf}" for path in linears for leaf in ("weight", "bias")}
    try:
        pattern = re.compile(name)
    except re.error as exc:
        raise ValueError(f"{name!r} is neither one of all, {', '.join(SETS)} nor a valid regular expression: "
                         f"{exc}") from exc
    return {key for key in base | leaves if pattern.fullmatch(key)}


def _norms(layout: Layout) -> list[str]:
    return [name.removesuffix(".weight") for name, shape in layout.parameters.items()
            if name.endswith(".weight") and len(shape) == 1]
