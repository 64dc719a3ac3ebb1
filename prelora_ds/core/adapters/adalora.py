"""The pure half of AdaLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from prelora_ds.core.adapters.kind import (
    AdapterCost,
    AdapterSpec,
    Capabilities,
    Needs,
    Option,
    OptionError,
    Shape,
    SimpleKind,
    rank_of,
)
from prelora_ds.core.duration import Duration
from prelora_ds.core.pruning import Pruning


class AdaLora(SimpleKind):
    """AdaLoRA (Zhang et al. 2023): W + s B (E * A), with A [rank, in], B [out, rank] and the singular values E [rank].

    The least important singular values of all linears are set to zero again and again, until the option ``share`` of
    them remains. E is zero at first. The option ``orthogonality`` is the weight of the regulariser that keeps the rows
    of A and the columns of B orthonormal.
    """

    A, B, E = "lora_A", "lora_B", "lora_E"
    roles_of_leaves = MappingProxyType({A: "a", B: "b", E: "e"})
    can = Capabilities(merges=True, restarts=False, resizes=False, ranked=True, rank_per_module=False, blocks=False,
                       scaled=True, selects=False, dropout=False, kernels=("branch",),
                       needs_weight=False, changes_bias=False, zero_stages=frozenset({0, 1, 2, 3}),
                       at_attach="exact")
    options: Mapping[str, Option] = MappingProxyType({
        "share": 0.5, "begin": "5 %", "end": "30 %", "every": "100 steps", "beta1": 0.85, "beta2": 0.85,
        "orthogonality": 0.5})

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        outputs, inputs = weight
        rank = rank_of(spec)
        return {self.A: (rank, inputs), self.B: (outputs, rank), self.E: (rank, 1)}

    def pruning(self, options: Mapping[str, Option]) -> Pruning:
        values = {**self.options, **options}
        numbers = {name: float(values[name]) for name in ("share", "beta1", "beta2", "orthogonality")}
        lengths = {name: _duration(name, str(values[name])) for name in ("begin", "end", "every")}
        if not 0 < numbers["share"] <= 1:
            raise OptionError("share", "must be more than 0 and at most 1")
        for name in ("beta1", "beta2"):
            if not 0 <= numbers[name] < 1:
                raise OptionError(name, "must be at least 0 and less than 1")
        if numbers["orthogonality"] < 0:
            raise OptionError("orthogonality", "must be at least 0")
        for name in ("end", "every"):
            if not lengths[name].value:
                raise OptionError(name, "must be longer than 0")
        begin, end = lengths["begin"], lengths["end"]
        if begin.unit == end.unit and begin.value >= end.value:
            raise OptionError("end", f"must be later than begin ({begin})")
        return Pruning(numbers["share"], begin, end, lengths["every"], numbers["beta1"], numbers["beta2"],
                       gate=self.E, axes=MappingProxyType({self.A: 0, self.B: 1, self.E: 0}))

    def cost(self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs) -> AdapterCost:
        """Count the products of `prelora_ds.model.adapters.adalora.AdaLoraLinear`, without those of the regulariser."""
        x = rows * inputs
        y = rows * outputs
        h = rows * rank_of(spec)
        down = 2 * rank_of(spec) * x  # FLOPs of a product with A
        up = 2 * rank_of(spec) * y  # FLOPs of a product with B
        needs_a = self.A in needs.leaves
        needs_b = self.B in needs.leaves
        needs_e = self.E in needs.leaves

        forward = down + up
        backward = 0
        traffic = x + 2 * y + 3 * h
        if needs_a or needs_e or needs.x:  # the gradient of E * x A^T
            backward += up
            traffic += y + h
        if needs.x:
            backward += down
            traffic += 2 * x + 3 * h
        if needs_a:
            backward += down
            traffic += x + 3 * h
        if needs_b:
            backward += up
            traffic += y + 3 * h
        if needs_e:
            traffic += 4 * h
        return AdapterCost(forward, backward, traffic, calls=3, keeps_input=needs_a, keeps_output=False,
                           saved=h if needs_b or needs_e else 0)


def _duration(name: str, text: str) -> Duration:
    try:
        return Duration(text)
    except ValueError as exc:
        raise OptionError(name, f"is not a duration: {exc}") from exc
