"""Adapters without torch: their leaves (parameters) and shapes, which of them train, and what each kind can do.

A kind has two halves of the same name. This package contains the pure halves, from which bytes, costs,
refusals and the table of docs/methods.md come; `prelora_ds.model.adapters` contains the halves that compute.
"""

from __future__ import annotations

from prelora_ds.core.adapters.adalora import AdaLora
from prelora_ds.core.adapters.dora import Dora
from prelora_ds.core.adapters.ia3 import IA3
from prelora_ds.core.adapters.kind import (
    AdapterCost,
    AdapterKind,
    AdapterSpec,
    Capabilities,
    Needs,
    Option,
    OptionError,
    Shape,
    rank_of,
)
from prelora_ds.core.adapters.lokr import LoKr
from prelora_ds.core.adapters.lora import Lora
from prelora_ds.core.adapters.miss import Miss
from prelora_ds.core.adapters.oft import Oft
from prelora_ds.core.adapters.vera import Vera

__all__ = ["IA3", "KINDS", "AdaLora", "AdapterCost", "AdapterKind", "AdapterSpec", "Capabilities", "Dora", "LoKr",
           "Lora", "Miss", "Needs", "Oft", "Option", "OptionError", "Shape", "Vera", "kind_called", "kind_of",
           "rank_of"]

KINDS: dict[str, AdapterKind] = {"lora": Lora(), "dora": Dora(), "vera": Vera(), "lokr": LoKr(), "oft": Oft(),
                                 "miss": Miss(), "ia3": IA3(), "adalora": AdaLora()}


def kind_called(name: str) -> AdapterKind:
    """The pure half of the kind ``name``. Raises ValueError for an unknown kind."""
    if name not in KINDS:
        raise ValueError(f"{name!r} is not a kind of adapter; known are {', '.join(KINDS)}")
    return KINDS[name]


def kind_of(spec: AdapterSpec) -> AdapterKind:
    """The pure half of the spec's kind. Raises ValueError for an unknown kind."""
    return kind_called(spec.kind)
