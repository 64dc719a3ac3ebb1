"""Attach a plan's adapters to a module, check them against the plan, and fold them into weights.

Each kind of adapter has two halves. The computing half is a file of this package; the pure half,
without torch, is in `prelora_ds.core.adapters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from prelora_ds.core.adapters import AdapterSpec, Shape, kind_of
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.model.adapters import lora
from prelora_ds.model.adapters.adalora import AdaLoraHalf
from prelora_ds.model.adapters.dora import DoraHalf
from prelora_ds.model.adapters.ia3 import IA3Half
from prelora_ds.model.adapters.linear import AdaptedLinear, adapted_linears
from prelora_ds.model.adapters.lokr import LoKrHalf
from prelora_ds.model.adapters.miss import MissHalf
from prelora_ds.model.adapters.oft import OftHalf
from prelora_ds.model.adapters.vera import VeraHalf
from prelora_ds.model.families import canonical_name, named_parameters


class Half(Protocol):
    """The computing half of a kind: the file of LoRA, or an object. lora.py documents each function.

    A kind whose `Capabilities` say that it needs the weight has no `product`, and one that cannot change its rank
    has no `shrunk`. Only a kind that changes the bias has `effective_bias`.
    """

    def attach(
        self, module: nn.Module, specs: Mapping[str, AdapterSpec], *, dropout: float, kernel: str
    ) -> None: ...

    def attached(self, module: nn.Module) -> dict[str, nn.Module]: ...

    def check(self, path: str, linear: nn.Module, spec: AdapterSpec) -> None: ...

    def initial(
        self, name: str, leaf: str, shape: Shape, spec: AdapterSpec, cycle: int,
        weight: torch.Tensor | None
    ) -> torch.Tensor: ...

    def product(
        self, values: Mapping[str, torch.Tensor], spec: AdapterSpec, weight: Shape, rows: slice
    ) -> torch.Tensor: ...

    def shrunk(
        self, values: Mapping[str, torch.Tensor], spec: AdapterSpec
    ) -> dict[str, torch.Tensor]: ...

    def effective(
        self, weight: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec
    ) -> torch.Tensor: ...

    def effective_bias(
        self, bias: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec
    ) -> torch.Tensor: ...

    def in_peft(
        self, specs: Mapping[str, AdapterSpec], values: Mapping[str, torch.Tensor], dropout: float
    ) -> tuple[Any, dict[str, torch.Tensor]]: ...


HALVES: dict[str, Any] = {"lora": lora, "dora": DoraHalf(), "vera": VeraHalf(), "lokr": LoKrHalf(), "oft": OftHalf(),
                          "miss": MissHalf(), "ia3": IA3Half(), "adalora": AdaLoraHalf()}


def half_of(kind: str) -> Half:
    """Return the computing half of ``kind``."""
    half: Half = HALVES[kind]
    return half


def attach_adapters(
    module: nn.Module, plan: Plan, layout: Layout, *, dropout: float, kernel: str = "branch"
) -> nn.Module:
    """Attach the adapters of ``plan`` to ``module``, and set which of them train now.

    dropout: the dropout probability on an adapter's input.
    kernel: how a linear with an adapter is computed; see lora.py.

    The linears whose weights the plan quantises lose these parameters (`LoraLinear.drop_weight`).

    Returns ``module``.

    Raises RuntimeError if the adapters do not match the plan afterwards.
    """
    for kind, specs in _by_kind(plan).items():
        half_of(kind).attach(module, specs, dropout=dropout, kernel=kernel)
    check_adapters(module, plan)
    linears: Any = {name: module.get_submodule(name.removesuffix(".weight")) for name in plan.quantised()}
    for linear in linears.values():
        linear.drop_weight(plan.base_dtype)
    activate(module, plan, layout)
    return module


def check_adapters(module: nn.Module, plan: Plan) -> None:
    """Compare each adapter of ``module`` with ``plan``.

    Raises RuntimeError, which names the first difference.
    """
    kinds: dict[str, str] = {}
    linears: dict[str, nn.Module] = {}
    for kind in HALVES:
        for path, linear in half_of(kind).attached(module).items():
            kinds[path] = kind
            linears[path] = linear

    planned_kinds = {path: spec.kind for path, spec in plan.adapters.items()}
    paths = kinds.keys() | planned_kinds.keys()
    different = sorted(path for path in paths if kinds.get(path) != planned_kinds.get(path))
    if different:
        raise RuntimeError(f"adapters of the model and of the plan differ, first at {different[0]}")

    for path, spec in plan.adapters.items():
        half_of(spec.kind).check(path, linears[path], spec)


def activate(module: nn.Module, plan: Plan, layout: Layout) -> None:
    """Set for each adapter whether it trains now (`Plan.training`) or only adds its branch."""
    training = plan.training()
    active = {path for name, (path, _) in plan.leaves(layout).items() if name in training}
    for path in plan.adapters:
        linear = module.get_submodule(path)
        if isinstance(linear, AdaptedLinear):
            linear.active = path in active


def refresh_adapters(module: nn.Module, *, inactive: bool = False) -> None:
    """Let all adapters of ``module`` update what they have computed from weights that have changed since.

    inactive: whether the leaves of inactive adapters may have changed, too.
    """
    for _, linear in adapted_linears(module):
        linear.refresh(inactive=inactive)


def besides_leaves(module: nn.Module) -> list[torch.Tensor]:
    """Return what the adapters of ``module`` keep besides their leaves. A shared tensor may come more than once."""
    return [tensor for _, linear in adapted_linears(module) for tensor in linear.besides_leaves()]


def check_names(module: nn.Module, plan: Plan, layout: Layout) -> None:
    """Compare the parameters and buffers of ``module`` with the plan's, by name and shape.

    Raises RuntimeError, which names the first difference: a tensor that is not in the plan would be
    neither saved nor restored.
    """
    parameters = {name: _shape(p) for name, p in named_parameters(module).items()}
    buffers = {canonical_name(name): tuple(b.shape) for name, b in module.named_buffers()}
    _check_shapes("parameter", parameters, plan.in_module(layout), plan.phase)
    _check_shapes("buffer", buffers, plan.buffers(layout), plan.phase)


def _check_shapes(
    what: str, in_model: Mapping[str, Shape], in_plan: Mapping[str, Shape], phase: str
) -> None:
    for name in sorted(in_model.keys() | in_plan.keys()):
        if in_model.get(name) != in_plan.get(name):
            raise RuntimeError(
                f"{what} {name} has the shape {in_model.get(name)} in the model and "
                f"{in_plan.get(name)} in the plan of phase {phase}"
            )


def initial_adapter_value(
    name: str, shape: Shape, plan: Plan, leaves: Mapping[str, tuple[str, str]],
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the fp32 initial value of an adapter's parameter.

    leaves: `Plan.leaves`.
    weight: the weight of its linear as the model computes with it, in BF16; only kinds that need it use it.
    """
    path, leaf = leaves[name]
    spec = plan.adapters[path]
    return half_of(spec.kind).initial(name, leaf, shape, spec, plan.cycle, weight)


def effective_weight(
    weight: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec | None
) -> torch.Tensor:
    """Return the weight with its adapter folded in, in fp32; without an adapter ``weight`` itself.

    weight: [out, in].
    values: leaf -> tensor of the adapter ``spec``.

    Norms, merges and exports all use this definition.
    """
    return weight if spec is None else half_of(spec.kind).effective(weight, values, spec)


def effective_bias(
    bias: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec
) -> torch.Tensor:
    """Return the ``bias`` [out] of a linear with its adapter folded in, in fp32; most kinds leave it as it is."""
    if not kind_of(spec).can.changes_bias:
        return bias.float()
    return half_of(spec.kind).effective_bias(bias, values, spec)


def fp32_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return name -> fp32 W of each weight that holds W + s B A (`LoraLinear.fp32_weight`)."""
    return {
        canonical_name(f"{path}.weight"): m.fp32_weight
        for path, m in module.named_modules()
        if isinstance(m, lora.LoraLinear) and m.fp32_weight is not None
    }


def quantised_linears(module: nn.Module) -> dict[str, lora.LoraLinear]:
    """Return name of the weight -> linear, for each linear whose weight is quantised."""
    return {
        canonical_name(f"{path}.weight"): m
        for path, m in module.named_modules()
        if isinstance(m, lora.LoraLinear) and m.base_dtype is not None
    }


def dense_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Return name and BF16 value of each quantised weight, one at a time."""
    return ((name, linear.dense_weight()) for name, linear in quantised_linears(module).items())


def _by_kind(plan: Plan) -> Mapping[str, Mapping[str, AdapterSpec]]:
    """Return kind -> path of a linear -> spec."""
    kinds: Iterable[str] = dict.fromkeys(spec.kind for spec in plan.adapters.values())
    return {
        kind: {path: s for path, s in plan.adapters.items() if s.kind == kind} for kind in kinds
    }


def _shape(p: torch.Tensor) -> Shape:
    """Return the full shape of ``p``, also if ZeRO-3 has partitioned it."""
    return tuple(getattr(p, "ds_shape", p.shape))
