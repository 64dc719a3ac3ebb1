"""The pure half of DoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prelora_ds.core.adapters.kind import AdapterCost, AdapterSpec, Capabilities, Needs, Option, Shape, rank_of
from prelora_ds.core.adapters.lora import Lora

FP32 = 4  # bytes


class Dora:
    """DoRA (Liu et al. 2024): each row of W + s B A has the norm m, with A [rank, in], B [out, rank] and m [out].

    A and B turn the row, and m sets its length. At first m is the norm of the row of W. The options are those of LoRA.
    """

    A, B, M = Lora.A, Lora.B, "lora_magnitude_vector.weight"
    can = Capabilities(merges=True, restarts=False, resizes=False, ranked=True, rank_per_module=True, blocks=False,
                       scaled=True, selects=True, dropout=False, kernels=("branch",),
                       needs_weight=True, changes_bias=False, zero_stages=frozenset({0, 1, 2, 3}),
                       at_attach="exact")
    options: Mapping[str, Option] = Lora.options
    choices: Mapping[str, tuple[str, ...]] = Lora.choices

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        outputs, inputs = weight
        return {self.A: (rank_of(spec), inputs), self.B: (outputs, rank_of(spec)), self.M: (outputs,)}

    def trains(self, spec: AdapterSpec) -> frozenset[str]:
        return Lora().trains(spec) | {self.M}

    def needs_update(self, spec: AdapterSpec) -> bool:
        return Lora().needs_update(spec)

    def pruning(self, options: Mapping[str, Option]) -> None:
        return None

    def role(self, leaf: str) -> str:
        return {self.A: "a", self.B: "b", self.M: "m"}[leaf]

    def roles(self) -> tuple[str, ...]:
        return ("a", "b", "m")

    def bytes_besides_leaves(self, linears: Sequence[tuple[Shape, AdapterSpec]]) -> int:
        """The fp32 norm of each row."""
        return FP32 * sum(outputs for (outputs, _), _ in linears)

    def cost(self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs) -> AdapterCost:
        """Count the products of `prelora_ds.model.adapters.dora.DoraLinear`, without the norms of a step."""
        x = rows * inputs
        y = rows * outputs
        down = 2 * rank_of(spec) * x  # FLOPs of a product with A
        up = 2 * rank_of(spec) * y  # FLOPs of a product with B
        needs_a = self.A in needs.leaves
        needs_b = self.B in needs.leaves
        needs_m = self.M in needs.leaves

        forward = down + up
        backward = 0
        traffic = x + 4 * y
        if needs_a or needs.x:
            backward += up
            traffic += y
        if needs.x:
            backward += down
            traffic += 2 * x + 2 * inputs * outputs  # the weight is scaled
        if needs_a:
            backward += down
            traffic += x
        if needs_b:
            backward += up
            traffic += y
        if needs_m:
            traffic += 5 * y
        return AdapterCost(forward, backward, traffic, calls=3, keeps_input=needs_a, keeps_output=needs_m,
                           saved=rows * rank_of(spec) if needs_b else 0)
