"""Adapters on a module: attached as the plan says, held against it, and folded into the weights.

Each kind of adapter has a file here, the half that computes; `prelora_ds.core.adapters` holds the pure half.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import nn

from prelora_ds.core.adapters import AdapterSpec, Shape
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.model.adapters import lora
from prelora_ds.model.families import canonical_name, named_parameters


class Half(Protocol):
    """What the file of a kind has. lora.py says what each function does."""

    def attach(self, module: nn.Module, specs: Mapping[str, AdapterSpec], *, dropout: float, kernel: str) -> None: ...

    def attached(self, module: nn.Module) -> dict[str, nn.Module]: ...

    def check(self, path: str, linear: nn.Module, spec: AdapterSpec) -> None: ...

    def set_active(self, linear: nn.Module, active: bool) -> None: ...

    def initial(self, name: str, leaf: str, shape: Shape, spec: AdapterSpec) -> torch.Tensor: ...

    def effective(self, weight: torch.Tensor, values: Mapping[str, torch.Tensor],
                  spec: AdapterSpec) -> torch.Tensor: ...


HALVES: dict[str, Half | ModuleType] = {"lora": lora}


def half_of(kind: str) -> Half:
    """The half of ``kind`` that computes."""
    return cast(Half, HALVES[kind])


def attach_adapters(module: nn.Module, plan: Plan, layout: Layout, *, dropout: float,
                    kernel: str = "branch") -> nn.Module:
    """Wrap the linears that ``plan`` names, and tell them whether they train.

    Raises RuntimeError when what came of it is not what the plan says.
    """
    for kind, specs in _by_kind(plan).items():
        half_of(kind).attach(module, specs, dropout=dropout, kernel=kernel)
    check_adapters(module, plan)
    activate(module, plan, layout)
    return module


def check_adapters(module: nn.Module, plan: Plan) -> None:
    """Compare each adapter of ``module`` with ``plan``. Raises RuntimeError that names the first difference."""
    found = {path: (kind, m) for kind in HALVES for path, m in half_of(kind).attached(module).items()}
    wanted = {path: spec.kind for path, spec in plan.adapters.items()}
    if {path: kind for path, (kind, _) in found.items()} != wanted:
        odd = sorted(path for path in found.keys() | wanted.keys()
                     if path not in found or found[path][0] != wanted.get(path))
        raise RuntimeError(f"adapters of the model and of the plan differ, first at {odd[0]}")
    for path, spec in plan.adapters.items():
        half_of(spec.kind).check(path, found[path][1], spec)


def activate(module: nn.Module, plan: Plan, layout: Layout) -> None:
    """Tell each linear whether its adapter trains now, or only adds its part: `Plan.training`."""
    training = plan.training()
    active = {path for name, (path, _) in plan.leaves(layout).items() if name in training}
    for path, spec in plan.adapters.items():
        half_of(spec.kind).set_active(module.get_submodule(path), path in active)


def check_names(module: nn.Module, plan: Plan, layout: Layout) -> None:
    """Compare the parameters and buffers of ``module`` with the plan's, by name and shape.

    Raises RuntimeError that names the first difference: what the plan does not know is neither saved nor restored.
    """
    parameters = {name: _shape(p) for name, p in named_parameters(module).items()}
    buffers = {canonical_name(name): tuple(b.shape) for name, b in module.named_buffers()}
    for what, found, wanted in (("parameter", parameters, plan.parameters(layout)),
                                ("buffer", buffers, plan.buffers(layout))):
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise RuntimeError(f"{what} {name} has the shape {found.get(name)} in the model and "
                                   f"{wanted.get(name)} in the plan of phase {plan.phase}")


def initial_adapter_value(name: str, shape: Shape, plan: Plan, leaves: Mapping[str, tuple[str, str]]) -> torch.Tensor:
    """The first value of an adapter's parameter, fp32. leaves: those of the plan, by name."""
    path, leaf = leaves[name]
    spec = plan.adapters[path]
    return half_of(spec.kind).initial(name, leaf, shape, spec)


def effective_weight(weight: torch.Tensor, values: Mapping[str, torch.Tensor],
                     spec: AdapterSpec | None) -> torch.Tensor:
    """What a linear with ``weight`` [out, in] and the adapter ``spec`` computes with, fp32. values: leaf -> tensor.

    The one definition for norms, merges and export. Without an adapter it is the weight itself.
    """
    return weight if spec is None else half_of(spec.kind).effective(weight, values, spec)


def fp32_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return name -> fp32 weight W, for weights that hold W + s B A in BF16 (`LoraLinear.fp32_weight`)."""
    return {canonical_name(f"{path}.weight"): m.fp32_weight for path, m in module.named_modules()
            if isinstance(m, lora.LoraLinear) and m.fp32_weight is not None}


def _by_kind(plan: Plan) -> Mapping[str, Mapping[str, AdapterSpec]]:
    kinds: Iterable[str] = dict.fromkeys(spec.kind for spec in plan.adapters.values())
    return {kind: {path: s for path, s in plan.adapters.items() if s.kind == kind} for kind in kinds}


def _shape(p: torch.Tensor) -> Shape:
    return tuple(getattr(p, "ds_shape", p.shape))
