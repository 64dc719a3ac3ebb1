"""The pure half of LoKr."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
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


class LoKr(SimpleKind):
    """LoKr (Yeh et al. 2024): W + s (W1 x W2), the Kronecker product of W1 [out1, in1] and W2 [out2, in2].

    out = out1 out2 and in = in1 in2 are products of integers as near to each other as possible, the smaller first. W2
    is itself a product of [out2, rank] and [rank, in2] if the rank is less than half of its larger side. W1 is zero at
    first.
    """

    W1, W2, W2_A, W2_B = "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"
    roles_of_leaves = MappingProxyType({W1: "w1", W2: "w2", W2_A: "w2", W2_B: "w2"})
    can = Capabilities(merges=True, restarts=False, resizes=False, ranked=True, rank_per_module=True, blocks=False,
                       scaled=True, selects=True, dropout=False, kernels=("branch",),
                       needs_weight=False, changes_bias=False, zero_stages=frozenset({0, 1, 2, 3}),
                       at_attach="exact")

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        (out1, out2), (in1, in2) = map(nearest_factors, weight)
        rank = rank_of(spec)
        if 2 * rank >= max(out2, in2):
            return {self.W1: (out1, in1), self.W2: (out2, in2)}
        return {self.W1: (out1, in1), self.W2_A: (out2, rank), self.W2_B: (rank, in2)}

    def cost(self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs) -> AdapterCost:
        """Count the products of `prelora_ds.model.adapters.lokr.LoKrLinear`, without that of W2's own factors."""
        (out1, out2), (in1, _) = nearest_factors(outputs), nearest_factors(inputs)
        x = rows * inputs
        y = rows * outputs
        h = rows * in1 * out2
        with_w2 = 2 * x * out2  # FLOPs of a product with W2 on one side
        with_w1 = 2 * h * out1
        needs_w1 = self.W1 in needs.leaves
        needs_w2 = bool(needs.leaves & {self.W2, self.W2_A, self.W2_B})

        forward = with_w2 + with_w1
        backward = 0
        traffic = x + 2 * h + 3 * y
        if needs.x or needs_w2:  # the gradient of x W2^T
            backward += with_w1
            traffic += y + h
        if needs.x:
            backward += with_w2
            traffic += h + 3 * x
        if needs_w2:
            backward += with_w2
            traffic += h + x
        if needs_w1:  # x W2^T is computed again
            backward += with_w2 + with_w1
            traffic += x + 4 * h + 3 * y
        return AdapterCost(forward, backward, traffic, calls=4, keeps_input=needs_w1 or needs_w2, keeps_output=False,
                           saved=0)


def nearest_factors(size: int) -> tuple[int, int]:
    """Return the two factors of ``size`` that are nearest to each other, the smaller first."""
    smaller = next(n for n in range(isqrt(size), 0, -1) if size % n == 0)
    return smaller, size // smaller
