"""What the algorithms need to know about a model: its parameters with shapes, and its linears by family and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from prelora_ds.core.adapters import Shape


@dataclass(frozen=True)
class Layout:
    """A model without adapters, as `prelora_ds.model.families` finds it.

    parameters: parameter name -> shape, in the module's order.
    targets: family -> layer -> path of the linear module that an adapter may wrap.
    buffers: buffer name -> shape.
    """

    parameters: Mapping[str, Shape]
    targets: Mapping[str, Mapping[int, str]]
    buffers: Mapping[str, Shape] = field(default_factory=dict)

    def modules(self) -> tuple[str, ...]:
        """The paths of all linears that can have an adapter."""
        return tuple(path for layers in self.targets.values() for path in layers.values())

    def layers(self) -> tuple[int, ...]:
        """The numbers of all layers."""
        return tuple(sorted({layer for layers in self.targets.values() for layer in layers}))

    def block(self, layer: int) -> str:
        """The dotted prefix of all parameters of a layer, such as ``vit.layers.3.``.

        It is the common path of all layers and the component in which they differ. Raises ValueError if there is no
        such layer.
        """
        for layers in self.targets.values():
            if layer in layers:
                path = layers[layer].split(".")
                others = [other.split(".") for i, other in layers.items() if i != layer]
                shared = min((_common_length(path, other) for other in others), default=len(path) - 1)
                return ".".join(path[: shared + 1]) + "."
        raise ValueError(f"no family has a layer {layer}")

    def before(self, layer: int) -> frozenset[str]:
        """The parameters that the module defines before block ``layer``. Raises ValueError as `block` does."""
        block = self.block(layer)
        names = list(self.parameters)
        first = next(i for i, name in enumerate(names) if name.startswith(block))
        return frozenset(names[:first])

    def after_blocks(self) -> frozenset[str]:
        """The parameters that the module defines after its last block: the last norm and the head."""
        block = self.block(self.layers()[-1])
        names = list(self.parameters)
        last = max(i for i, name in enumerate(names) if name.startswith(block))
        return frozenset(names[last + 1:])


def _common_length(path: Sequence[str], other: Sequence[str]) -> int:
    """The number of leading components that two paths have in common."""
    pairs = zip(path, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
