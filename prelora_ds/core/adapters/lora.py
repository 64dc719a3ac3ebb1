"""The pure half of LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from prelora_ds.core.adapters.kind import AdapterCost, AdapterSpec, Capabilities, Needs, Option, Shape, rank_of


class Lora:
    """LoRA (Hu et al. 2021): W + s B A, with A [rank, in] and B [out, rank].

    With the option ``train_a`` set to false A stays at its first value: LoRA-FA (Zhang et al. 2023).

    The option ``init`` is the distribution of A's first value: ``kaiming`` is uniform with the bound 1 / sqrt(in),
    ``gaussian`` is normal with the deviation 1 / rank. With ``update`` its rows are the directions of the inputs in
    which the optimizer changes the weight most. B is zero at first.
    """

    A, B = "lora_A.weight", "lora_B.weight"
    can = Capabilities(merges=True, restarts=True, resizes=True, ranked=True, rank_per_module=True, blocks=False,
                       scaled=True, selects=True, dropout=True, kernels=("branch", "merged", "peft"),
                       needs_weight=False, changes_bias=False, zero_stages=frozenset({0, 1, 2, 3}),
                       at_attach="exact", quantised=True)
    options: Mapping[str, Option] = MappingProxyType({"train_a": True, "init": "kaiming"})
    choices: Mapping[str, tuple[str, ...]] = MappingProxyType({"init": ("kaiming", "gaussian", "update")})

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        outputs, inputs = weight
        return {self.A: (rank_of(spec), inputs), self.B: (outputs, rank_of(spec))}

    def trains(self, spec: AdapterSpec) -> frozenset[str]:
        train_a = spec.options.get("train_a", self.options["train_a"])
        return frozenset({self.A, self.B} if train_a else {self.B})

    def needs_update(self, spec: AdapterSpec) -> bool:
        return spec.options.get("init", self.options["init"]) == "update"

    def pruning(self, options: Mapping[str, Option]) -> None:
        return None

    def role(self, leaf: str) -> str:
        return {self.A: "a", self.B: "b"}[leaf]

    def roles(self) -> tuple[str, ...]:
        return ("a", "b")

    def bytes_besides_leaves(self, linears: Sequence[tuple[Shape, AdapterSpec]]) -> int:
        return 0

    def cost(self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs) -> AdapterCost:
        """Count the products of `prelora_ds.model.adapters.lora.LoraLinear`."""
        x = rows * inputs
        y = rows * outputs
        down = 2 * rank_of(spec) * x  # FLOPs of a product with A
        up = 2 * rank_of(spec) * y  # FLOPs of a product with B
        needs_a = self.A in needs.leaves
        needs_b = self.B in needs.leaves
        into_x = needs.x and not needs.folded

        forward = 0
        backward = 0
        traffic = 0
        if not needs.folded:
            forward += down + up
            traffic += x + 2 * y
        if needs_a or into_x:  # the gradient of x A^T
            backward += up
            traffic += y
        if into_x:
            backward += down
            traffic += 2 * x
        if needs_a:
            backward += down
            traffic += x
        if needs_b:
            backward += up
            traffic += y
        if needs_b and needs.folded:  # x A^T, which the forward pass did not compute
            backward += down
            traffic += x

        keeps_product = needs_b and (not needs.folded or not needs_a)
        return AdapterCost(forward, backward, traffic, calls=2, keeps_input=needs_a, keeps_output=False,
                           saved=rows * rank_of(spec) if keeps_product else 0)
