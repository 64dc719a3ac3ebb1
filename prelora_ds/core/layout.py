"""What the algorithms know of a model: the names and shapes of its parameters, and its linears by family and layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile

from prelora_ds.core.adapters import Shape


@dataclass(frozen=True)
class Layout:
    """A model without adapters; made by `prelora_ds.model.families`.

    parameters: parameter name -> shape, in the module's order.
    targets: family -> layer -> path of the linear module that an adapter may wrap.
    buffers: buffer name -> shape.
    """

    parameters: Mapping[str, Shape]
    targets: Mapping[str, Mapping[int, str]]
    buffers: Mapping[str, Shape] = field(default_factory=dict)

    def modules(self) -> tuple[str, ...]:
        """The paths of all linears that can carry an adapter."""
        return tuple(path for layers in self.targets.values() for path in layers.values())

    def layers(self) -> tuple[int, ...]:
        """The numbers of all layers."""
        return tuple(sorted({layer for layers in self.targets.values() for layer in layers}))

    def block(self, layer: int) -> str:
        """The dotted prefix of all parameters of a layer, ``vit.layers.3.``: up to where paths of layers differ.

        Raises ValueError when there is no such layer.
        """
        for layers in self.targets.values():
            if layer in layers:
                own = layers[layer].split(".")
                others = [path.split(".") for i, path in layers.items() if i != layer]
                shared = min((sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(own, other, strict=False)))
                              for other in others), default=len(own) - 1)
                return ".".join(own[: shared + 1]) + "."
        raise ValueError(f"no family has a layer {layer}")

    def before(self, layer: int) -> frozenset[str]:
        """The parameters that the module defines before block ``layer``. Raises ValueError as `block` does."""
        block, names = self.block(layer), list(self.parameters)
        first = next(i for i, name in enumerate(names) if name.startswith(block))
        return frozenset(names[:first])

    def after_blocks(self) -> frozenset[str]:
        """The parameters that the module defines after its last block: the last norm and the head."""
        block, names = self.block(self.layers()[-1]), list(self.parameters)
        last = max(i for i, name in enumerate(names) if name.startswith(block))
        return frozenset(names[last + 1:])
