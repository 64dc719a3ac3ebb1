"""What the pure half of a kind of adapter consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol

from prelora_ds.core.pruning import Pruning

Shape = tuple[int, ...]
Option = bool | int | float | str


class OptionError(ValueError):
    """An option of a kind has a value that is not possible.

    problem: completes a sentence that begins with the value.
    """

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"{option} {problem}")
        self.option = option
        self.problem = problem


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

    merges: whether the adapter can be merged into the fp32 weight while a run lasts. For norms and in an export every
        kind can be merged.
    restarts: whether it can start again from first values without changing the outputs.
    resizes: whether its rank can change while it trains, without changing the outputs.
    ranked: whether its adapters have a rank.
    rank_per_module: whether each linear may have its own rank.
    blocks: whether the rank is the size of blocks of the inputs: at least 2, and a divisor of their number.
    scaled: whether what it adds has a factor (`AdapterSpec.scaling`); otherwise that is 1.
    selects: whether single adapters can stop training for some steps (DynaLoRA).
    dropout: whether its input can have dropout.
    kernels: the ways to compute it; the first one works always.
    needs_weight: whether its first values, and what it adds to the weight, are functions of the weight.
    changes_bias: whether it also changes the bias of its linear, so that only an export can merge it.
    zero_stages: the ZeRO stages at which a test trains it.
    at_attach: whether attaching it keeps the outputs bitwise (exact) or changes them by rounding.
    quantised: whether its linear can compute with a weight in few bits (`Plan.base_dtype`).
    """

    merges: bool
    restarts: bool
    resizes: bool
    ranked: bool
    rank_per_module: bool
    blocks: bool
    scaled: bool
    selects: bool
    dropout: bool
    kernels: tuple[str, ...]
    needs_weight: bool
    changes_bias: bool
    zero_stages: frozenset[int]
    at_attach: Literal["exact", "rounding"]
    quantised: bool = False


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
    keeps_output: whether it needs the output.
    saved: elements kept for the backward pass in addition to the input and the output.
    """

    forward_flops: int
    backward_flops: int
    traffic: int
    calls: int
    keeps_input: bool
    keeps_output: bool
    saved: int


class AdapterKind(Protocol):
    """The pure half of a kind."""

    @property
    def can(self) -> Capabilities: ...

    @property
    def options(self) -> Mapping[str, Option]:
        """Name -> default of each option; a value must have the type of the default."""
        ...

    @property
    def choices(self) -> Mapping[str, tuple[str, ...]]:
        """Name -> the values that are possible, for each option that is a text."""
        ...

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        """Leaf name -> shape, in the module's order, for a linear whose weight is [out, in]."""
        ...

    def trains(self, spec: AdapterSpec) -> frozenset[str]:
        """The leaves that train. Names of leaves that only other linears have may be among them."""
        ...

    def needs_update(self, spec: AdapterSpec) -> bool:
        """Whether its first values are made from the update that the optimizer gives the weight at the switch."""
        ...

    def pruning(self, options: Mapping[str, Option]) -> Pruning | None:
        """How components of its adapters are pruned; None if they are not. Raises OptionError."""
        ...

    def role(self, leaf: str) -> str:
        """The role of a leaf. The learning rate can be scaled per role."""
        ...

    def roles(self) -> tuple[str, ...]:
        """All roles of the kind."""
        ...

    def bytes_besides_leaves(self, linears: Sequence[tuple[Shape, AdapterSpec]]) -> int:
        """Bytes that adapters keep besides their leaves, on every rank and at every ZeRO stage.

        linears: the shape of the weight and the adapter, for all linears with an adapter of this kind.
        """
        ...

    def cost(self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs) -> AdapterCost:
        """The cost for ``rows`` tokens of a linear from ``inputs`` to ``outputs`` features."""
        ...


class SimpleKind:
    """What kinds have in common that have no options, train all their leaves, and keep nothing besides them."""

    options: Mapping[str, Option] = MappingProxyType({})
    choices: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    roles_of_leaves: Mapping[str, str]

    def trains(self, spec: AdapterSpec) -> frozenset[str]:
        return frozenset(self.roles_of_leaves)

    def needs_update(self, spec: AdapterSpec) -> bool:
        return False

    def pruning(self, options: Mapping[str, Option]) -> Pruning | None:
        return None

    def role(self, leaf: str) -> str:
        return self.roles_of_leaves[leaf]

    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.roles_of_leaves.values()))

    def bytes_besides_leaves(self, linears: Sequence[tuple[Shape, AdapterSpec]]) -> int:
        return 0


def rank_of(spec: AdapterSpec) -> int:
    """The rank of an adapter whose kind has ranks."""
    assert spec.rank is not None
    return spec.rank
