"""The pure half of OFT."""

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


class Oft(SimpleKind):
    """OFT (Qiu et al. 2023), in the form of OFTv2 (Qiu et al. 2025): W R^T, where R rotates blocks of the inputs.

    The rank is the size of a block, which must divide the number of inputs. The leaf [in / rank, rank (rank - 1) / 2]
    has the elements above the diagonal of one skew-symmetric matrix Q per block, and R is nearly the Cayley transform
    (I + Q) (I - Q)^-1. At first it is the identity.
    """

    Q = "oft_R.weight"
    roles_of_leaves = MappingProxyType({Q: "q"})
    can = Capabilities(merges=True, restarts=False, resizes=False, ranked=True, rank_per_module=False, blocks=True,
                       scaled=False, selects=True, dropout=False, kernels=("branch",),
                       needs_weight=True, changes_bias=False, zero_stages=frozenset({0, 1, 2, 3}),
                       at_attach="exact")

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        _, inputs = weight
        size = rank_of(spec)
        return {self.Q: (inputs // size, size * (size - 1) // 2)}

    def cost(self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs) -> AdapterCost:
        """Count the products of `prelora_ds.model.adapters.oft.OftLinear` with R, not the few that make R."""
        x = rows * inputs
        turn = 2 * rank_of(spec) * x  # FLOPs of a product with R
        trains = self.Q in needs.leaves
        backward = turn * (trains + needs.x)
        traffic = 2 * x * (1 + trains + needs.x)
        if trains and not needs.x:  # the gradient of the rotated input, for R only
            backward += 2 * x * outputs
        return AdapterCost(turn, backward, traffic, calls=4, keeps_input=trains, keeps_output=False, saved=0)
