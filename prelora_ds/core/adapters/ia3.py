"""The pure half of IA3."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from prelora_ds.core.adapters.kind import AdapterCost, AdapterSpec, Capabilities, Needs, Shape, SimpleKind


class IA3(SimpleKind):
    """IA3 (Liu et al. 2022): each output of a linear is multiplied by a number that trains, l [out].

    The leaf is l - 1, which is zero at first. BF16 resolves it much more finely than numbers near 1. A merge would also
    change the bias, which only an export can do.
    """

    GAIN = "ia3_gain"
    roles_of_leaves = MappingProxyType({GAIN: "gain"})
    can = Capabilities(merges=False, restarts=False, resizes=False, ranked=False, rank_per_module=False, blocks=False,
                       scaled=False, selects=True, dropout=False, kernels=("branch",),
                       needs_weight=True, changes_bias=True, zero_stages=frozenset({0, 1, 2, 3}),
                       at_attach="exact")

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        return {self.GAIN: (weight[0],)}

    def cost(self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs) -> AdapterCost:
        """Count the elements that `prelora_ds.model.adapters.ia3.IA3Linear` reads and writes. It has no products."""
        y = rows * outputs
        trains = self.GAIN in needs.leaves
        traffic = 2 * y + (2 * inputs * outputs if needs.x else 0) + (2 * y if trains else 0)
        return AdapterCost(0, 0, traffic, calls=1, keeps_input=False, keeps_output=trains, saved=0)
