"""What an adapter is, without torch: its leaves and their shapes, which of them train, and what its kind can do.

A kind has two halves of one name. This is the pure half, from which bytes, costs, refusals and the support matrix of
docs/methods.md come; `prelora_ds.model.adapters` holds the half that computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Shape = tuple[int, ...]
Option = bool | int | float | str


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter of one linear.

    kind: a key of `KINDS`.
    rank: None for a kind that has no rank.
    scaling: the factor of what the adapter adds, resolved (``alpha / rank`` in LoRA).
    seed: the first values are a function of it and of the parameter's name; each restart has its own.
    options: what else the kind can be told.
    """

    kind: str
    rank: int | None
    scaling: float
    seed: int
    options: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class Capabilities:
    """What a kind can do. Recipes that ask for more are refused when they are read.

    merges: the adapter can be folded into the weight, for norms, export and ReLoRA.
    restarts: it can begin anew from first values without moving the outputs.
    rank_per_module: each linear may have its own rank.
    kernels: the ways to compute it; the first is the one that can always be taken.
    needs_weight: its first values are a function of the weight.
    zero_stages: the ZeRO stages at which it was trained in a test.
    at_attach: whether attaching it leaves the outputs bitwise as they were, or within rounding.
    """

    merges: bool
    restarts: bool
    rank_per_module: bool
    kernels: tuple[str, ...]
    needs_weight: bool
    zero_stages: frozenset[int]
    at_attach: Literal["exact", "rounding"]


@dataclass(frozen=True)
class Needs:
    """What a linear with an adapter has to compute in a step.

    x: the gradient of its input. leaves: the leaves whose gradients are wanted. folded: the adapter is folded into
    the weight, which costs no product in the forward pass.
    """

    x: bool
    leaves: frozenset[str]
    folded: bool


@dataclass(frozen=True)
class AdapterCost:
    """One adapter's part of a step: FLOPs, elements read and written, modules run, and what is kept for backward.

    keeps_input: whether backward needs the linear's input. saved: elements kept beside it.
    """

    forward_flops: int
    backward_flops: int
    traffic: int
    calls: int
    keeps_input: bool
    saved: int


class AdapterKind(Protocol):
    """The pure half of a kind."""

    @property
    def can(self) -> Capabilities: ...

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        """Leaf name -> shape, for a linear whose weight is [out, in], in the module's order."""
        ...

    def trains(self, spec: AdapterSpec) -> frozenset[str]:
        """The leaves that an optimizer may step."""
        ...

    def role(self, leaf: str) -> str:
        """The optimizer's name for a leaf: a learning rate can be scaled per role (`roles`)."""
        ...

    def roles(self) -> tuple[str, ...]:
        """All roles of the kind."""
        ...

    def cost(self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs) -> AdapterCost:
        """The cost for ``rows`` tokens of a linear from ``inputs`` to ``outputs`` features."""
        ...


class Lora:
    """LoRA (Hu et al. 2021): W + s B A, with A [rank, in] and B [out, rank].

    Option ``train_a`` (default true): false leaves A at its first value, which is LoRA-FA (Zhang et al. 2023).
    """

    A, B = "lora_A.weight", "lora_B.weight"
    can = Capabilities(merges=True, restarts=True, rank_per_module=True, kernels=("branch", "merged", "peft"),
                       needs_weight=False, zero_stages=frozenset({0, 1, 2, 3}), at_attach="exact")

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        outputs, inputs = weight
        assert spec.rank is not None
        return {self.A: (spec.rank, inputs), self.B: (outputs, spec.rank)}

    def trains(self, spec: AdapterSpec) -> frozenset[str]:
        return frozenset({self.A, self.B} if spec.options.get("train_a", True) else {self.B})

    def role(self, leaf: str) -> str:
        return {self.A: "a", self.B: "b"}[leaf]

    def roles(self) -> tuple[str, ...]:
        return ("a", "b")

    def cost(self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs) -> AdapterCost:
        """Source: the products of `prelora_ds.model.adapters.lora.LoraLinear`."""
        assert spec.rank is not None
        x, y = rows * inputs, rows * outputs
        down, up = 2 * spec.rank * x, 2 * spec.rank * y  # FLOPs of a product with A, and with B
        needs_a, needs_b = self.A in needs.leaves, self.B in needs.leaves
        into_x = needs.x and not needs.folded

        forward, backward, traffic = 0, 0, 0
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
        return AdapterCost(forward, backward, traffic, calls=2, keeps_input=needs_a,
                           saved=rows * spec.rank if keeps_product else 0)


KINDS: dict[str, AdapterKind] = {"lora": Lora()}


def kind_of(spec: AdapterSpec) -> AdapterKind:
    """The pure half of the spec's kind. Raises ValueError for one that is not known."""
    if spec.kind not in KINDS:
        raise ValueError(f"{spec.kind!r} is not a kind of adapter; known are {', '.join(KINDS)}")
    return KINDS[spec.kind]
