"""Adapters without torch: their leaves (parameters) and shapes, which of them train, and what each kind can do.

A kind has two halves of the same name. This module contains the pure half, from which bytes, costs,
refusals and the table of docs/methods.md come; `prelora_ds.model.adapters` contains the half that computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol

Shape = tuple[int, ...]
Option = bool | int | float | str


@dataclass(frozen=True)
class AdapterSpec:
    """The adapter of one linear.

    kind: a key of `KINDS`.
    rank: the rank, or None for a kind without ranks.
    scaling: the factor of what the adapter adds (``alpha / rank`` in LoRA).
    seed: the first values are a function of it and of the parameter's name; each restart has another.
    options: the options of the kind that do not have their defaults.
    """

    kind: str
    rank: int | None
    scaling: float
    seed: int
    options: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class Capabilities:
    """What a kind supports. A recipe that needs more is refused when it is read.

    merges: whether the adapter can be merged into the weight, for norms, export and ReLoRA.
    restarts: whether it can start again from first values without changing the outputs.
    resizes: whether its rank can change while it trains, without changing the outputs.
    rank_per_module: whether each linear may have its own rank.
    kernels: the ways to compute it; the first one works always.
    needs_weight: whether its first values are a function of the weight.
    zero_stages: the ZeRO stages at which a test trains it.
    at_attach: whether attaching it keeps the outputs bitwise (exact) or changes them by rounding.
    """

    merges: bool
    restarts: bool
    resizes: bool
    rank_per_module: bool
    kernels: tuple[str, ...]
    needs_weight: bool
    zero_stages: frozenset[int]
    at_attach: Literal["exact", "rounding"]


@dataclass(frozen=True)
class Needs:
    """What a linear with an adapter must compute in a step.

    x: whether the gradient of its input is needed.
    leaves: the leaves whose gradients are needed.
    folded: whether the adapter is merged into the weight, so that the forward pass has no extra product.
    """

    x: bool
    leaves: frozenset[str]
    folded: bool


@dataclass(frozen=True)
class AdapterCost:
    """The cost of one adapter in a step.

    forward_flops, backward_flops: FLOPs of the two passes.
    traffic: elements read and written.
    calls: modules run.
    keeps_input: whether the backward pass needs the input of the linear.
    saved: elements kept for the backward pass in addition to the input.
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

    @property
    def options(self) -> Mapping[str, Option]:
        """Name -> default of each option; a value must have the type of the default."""
        ...

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        """Leaf name -> shape, in the module's order, for a linear whose weight is [out, in]."""
        ...

    def trains(self, spec: AdapterSpec) -> frozenset[str]:
        """The leaves that train."""
        ...

    def role(self, leaf: str) -> str:
        """The role of a leaf. The learning rate can be scaled per role."""
        ...

    def roles(self) -> tuple[str, ...]:
        """All roles of the kind."""
        ...

    def cost(self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs) -> AdapterCost:
        """The cost for ``rows`` tokens of a linear from ``inputs`` to ``outputs`` features."""
        ...


class Lora:
    """LoRA (Hu et al. 2021): W + s B A, with A [rank, in] and B [out, rank].

    With the option ``train_a`` set to false A stays at its first value: LoRA-FA (Zhang et al. 2023).
    """

    A, B = "lora_A.weight", "lora_B.weight"
    can = Capabilities(merges=True, restarts=True, resizes=True, rank_per_module=True,
                       kernels=("branch", "merged", "peft"),
                       needs_weight=False, zero_stages=frozenset({0, 1, 2, 3}), at_attach="exact")
    options: Mapping[str, Option] = MappingProxyType({"train_a": True})

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        outputs, inputs = weight
        assert spec.rank is not None
        return {self.A: (spec.rank, inputs), self.B: (outputs, spec.rank)}

    def trains(self, spec: AdapterSpec) -> frozenset[str]:
        train_a = spec.options.get("train_a", self.options["train_a"])
        return frozenset({self.A, self.B} if train_a else {self.B})

    def role(self, leaf: str) -> str:
        return {self.A: "a", self.B: "b"}[leaf]

    def roles(self) -> tuple[str, ...]:
        return ("a", "b")

    def cost(self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs) -> AdapterCost:
        """Count the products of `prelora_ds.model.adapters.lora.LoraLinear`."""
        assert spec.rank is not None
        x = rows * inputs
        y = rows * outputs
        down = 2 * spec.rank * x  # FLOPs of a product with A
        up = 2 * spec.rank * y  # FLOPs of a product with B
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
        return AdapterCost(forward, backward, traffic, calls=2, keeps_input=needs_a,
                           saved=rows * spec.rank if keeps_product else 0)


KINDS: dict[str, AdapterKind] = {"lora": Lora()}


def kind_of(spec: AdapterSpec) -> AdapterKind:
    """The pure half of the spec's kind. Raises ValueError for an unknown kind."""
    if spec.kind not in KINDS:
        raise ValueError(f"{spec.kind!r} is not a kind of adapter; known are {', '.join(KINDS)}")
    return KINDS[spec.kind]
