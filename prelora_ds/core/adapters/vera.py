"""The pure half of VeRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from prelora_ds.core.adapters.kind import AdapterCost, AdapterSpec, Capabilities, Needs, Option, Shape, rank_of

BF16 = 2  # bytes


class Vera:
    """VeRA (Kopiczko et al. 2024): W + b * (B (d * A)), where only the vectors b [out] and d [rank] train.

    A [rank, in] and B [out, rank] are random, and all linears share them. The option ``d_initial`` is the first value
    of d.
    """

    B, D = "vera_lambda_b", "vera_lambda_d"
    can = Capabilities(merges=True, restarts=False, resizes=False, ranked=True, rank_per_module=False, blocks=False,
                       scaled=True, selects=True, dropout=False, kernels=("branch",),
                       needs_weight=False, changes_bias=False, zero_stages=frozenset({0, 1, 2, 3}),
                       at_attach="exact")
    options: Mapping[str, Option] = MappingProxyType({"d_initial": 0.1})
    choices: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        return {self.B: (weight[0],), self.D: (rank_of(spec),)}

    def trains(self, spec: AdapterSpec) -> frozenset[str]:
        return frozenset({self.B, self.D})

    def needs_update(self, spec: AdapterSpec) -> bool:
        return False

    def pruning(self, options: Mapping[str, Option]) -> None:
        return None

    def role(self, leaf: str) -> str:
        return {self.B: "b", self.D: "d"}[leaf]

    def roles(self) -> tuple[str, ...]:
        return ("b", "d")

    def bytes_besides_leaves(self, linears: Sequence[tuple[Shape, AdapterSpec]]) -> int:
        """One pair of matrices, as large as the largest linears need, in BF16."""
        ranks = {rank_of(spec) for _, spec in linears}
        widths = max(outputs for (outputs, _), _ in linears) + max(inputs for (_, inputs), _ in linears)
        return BF16 * sum(ranks) * widths

    def cost(self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs) -> AdapterCost:
        """Count the products of `prelora_ds.model.adapters.vera.VeraLinear`."""
        x = rows * inputs
        y = rows * outputs
        h = rows * rank_of(spec)
        down = 2 * rank_of(spec) * x  # FLOPs of a product with A
        up = 2 * rank_of(spec) * y  # FLOPs of a product with B
        needs_b = self.B in needs.leaves
        needs_d = self.D in needs.leaves

        forward = down + up
        backward = 0
        traffic = x + 2 * y + 3 * h
        if needs_d or needs.x:  # the gradient of d * x A^T
            backward += up
            traffic += y + h
        if needs.x:
            backward += down
            traffic += 2 * x + 3 * h
        if needs_b:
            backward += up
            traffic += y + 3 * h
        if needs_d:
            traffic += 4 * h
        return AdapterCost(forward, backward, traffic, calls=3, keeps_input=False, keeps_output=False,
                           saved=h if needs_b or needs_d else 0)
