"""The pure half of MiSS."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from prelora_ds.core.adapters.kind import (
    AdapterCost,
    AdapterSpec,
    Capabilities,
    Needs,
    Shape,
    SimpleKind,
    rank_of,
)


class Miss(SimpleKind):
    """MiSS (Kang and Yin 2024, the successor of Bone): W + D, where D has the same [out, rank] again and again.

    The leaf D^T [rank, out] is zero at first. The inputs rank, 2 rank, ... apart from each other share a row of it, so
    its part of the output is that of a linear whose inputs are sums of such inputs.
    """

    BLOCK = "miss_block"
    roles_of_leaves = MappingProxyType({BLOCK: "block"})
    can = Capabilities(merges=True, restarts=False, resizes=False, ranked=True, rank_per_module=False, blocks=False,
                       scaled=False, selects=True, dropout=False, kernels=("branch",),
                       needs_weight=False, changes_bias=False, zero_stages=frozenset({0, 1, 2, 3}),
                       at_attach="exact")

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        return {self.BLOCK: (rank_of(spec), weight[0])}

    def cost(self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs) -> AdapterCost:
        """Count the products of `prelora_ds.model.adapters.miss.MissLinear`."""
        x = rows * inputs
        y = rows * outputs
        h = rows * rank_of(spec)
        product = 2 * rank_of(spec) * y  # FLOPs of a product with the block
        trains = self.BLOCK in needs.leaves
        backward = product * (trains + needs.x)
        traffic = x + 2 * y + 2 * h + (y + h if trains else 0) + (y + 2 * h + 2 * x if needs.x else 0)
        return AdapterCost(product, backward, traffic, calls=2, keeps_input=False, keeps_output=False,
                           saved=h if trains else 0)
