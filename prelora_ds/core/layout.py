"""What the algorithms need to know about a model: its parameters with shapes, and its linears by family and layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from prelora_ds.core.adapters import Shape

# The names of transformers 5 and of the versions before. The paper calls both o and fc1 "dense".
VIT_FAMILIES = {
    "q": r".*\.layers?\.(?P<layer>\d+)\.attention\.(q_proj|attention\.query)",
    "k": r".*\.layers?\.(?P<layer>\d+)\.attention\.(k_proj|attention\.key)",
    "v": r".*\.layers?\.(?P<layer>\d+)\.attention\.(v_proj|attention\.value)",
    "o": r".*\.layers?\.(?P<layer>\d+)\.attention\.(o_proj|output\.dense)",
    "fc1": r".*\.layers?\.(?P<layer>\d+)\.(mlp\.fc1|intermediate\.dense)",
    "fc2": r".*\.layers?\.(?P<layer>\d+)\.(mlp\.fc2|output\.dense)",
}


def family_and_layer(path: str, patterns: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Return the family and the layer of the linear at ``path``, by `VIT_FAMILIES` or other ``patterns`` of this form.

    A linear of no family counts as one of its own, in layer 0.
    """
    for family, pattern in (VIT_FAMILIES if patterns is None else patterns).items():
        match = re.fullmatch(pattern, path)
        if match is not None and (match["layer"] or "").isdecimal():
            return family, int(match["layer"])
    return path, 0


@dataclass(frozen=True)
class Layout:
    """A model without adapters, as `prelora_ds.model.families` finds it.

    parameters: parameter name -> shape, in the module's order.
    targets: family -> layer -> path of the linear module that an adapter may wrap.
    blocks: dotted prefix of all parameters of a block, such as ``vit.layers.3.`` -> its layer, in the module's order;
        also of blocks without a target.
    buffers: buffer name -> shape.
    """

    parameters: Mapping[str, Shape]
    targets: Mapping[str, Mapping[int, str]]
    blocks: Mapping[str, int] = field(default_factory=dict)
    buffers: Mapping[str, Shape] = field(default_factory=dict)

    def modules(self) -> tuple[str, ...]:
        """The paths of all linears that can have an adapter."""
        return tuple(path for layers in self.targets.values() for path in layers.values())

    def block(self, layer: int) -> str:
        """The dotted prefix of block ``layer``. Raises ValueError if there is no such block, or more than one."""
        found = [prefix for prefix, number in self.blocks.items() if number == layer]
        if not found:
            raise ValueError(f"the model has no layer {layer}")
        if len(found) > 1:
            raise ValueError(f"the model has more than one layer {layer}: {', '.join(found)}")
        return found[0]

    def before(self, layer: int) -> frozenset[str]:
        """The parameters that the module defines before block ``layer``. Raises ValueError as `block` does."""
        return frozenset(list(self.parameters)[: self._indices((self.block(layer),))[0]])

    def before_blocks(self) -> frozenset[str]:
        """The parameters that the module defines before its first block: the embeddings."""
        return frozenset(list(self.parameters)[: self._indices(tuple(self.blocks))[0]])

    def after_blocks(self) -> frozenset[str]:
        """The parameters that the module defines after its last block: the last norm and the head."""
        return frozenset(list(self.parameters)[self._indices(tuple(self.blocks))[-1] + 1:])

    def _indices(self, prefixes: tuple[str, ...]) -> list[int]:
        """The positions of the parameters that begin with one of ``prefixes``."""
        return [i for i, name in enumerate(self.parameters) if name.startswith(prefixes)]
