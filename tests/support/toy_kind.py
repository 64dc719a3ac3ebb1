"""A minimal second kind of adapter, for tests: each output of a linear is scaled by 1 + gain.

The gain starts at 0. `ToyKind` is the pure half, this module is the computing half, and `register`
registers both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from prelora_ds.core.adapters import (
    KINDS,
    AdapterCost,
    AdapterSpec,
    Capabilities,
    Needs,
    Option,
    Shape,
)
from prelora_ds.model.adapters import HALVES
from prelora_ds.model.families import ADAPTER_NAME


class ToyKind:
    """The pure half."""

    can = Capabilities(
        merges=True,
        restarts=True,
        resizes=False,
        ranked=True,
        rank_per_module=False,
        blocks=False,
        scaled=True,
        selects=False,
        dropout=False,
        kernels=("branch",),
        needs_weight=False,
        changes_bias=False,
        zero_stages=frozenset({0, 1, 2, 3}),
        at_attach="exact",
    )
    options: Mapping[str, Option] = MappingProxyType({})
    choices: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def parameters(self, weight: Shape, spec: AdapterSpec) -> Mapping[str, Shape]:
        return {"gain": (weight[0],)}

    def trains(self, spec: AdapterSpec) -> frozenset[str]:
        return frozenset({"gain"})

    def needs_update(self, spec: AdapterSpec) -> bool:
        return False

    def pruning(self, options: Mapping[str, Option]) -> None:
        return None

    def role(self, leaf: str) -> str:
        return "gain"

    def roles(self) -> tuple[str, ...]:
        return ("gain",)

    def bytes_besides_leaves(self, linears: Sequence[tuple[Shape, AdapterSpec]]) -> int:
        return 0

    def cost(
        self, spec: AdapterSpec, rows: int, inputs: int, outputs: int, needs: Needs
    ) -> AdapterCost:
        return AdapterCost(
            rows * outputs, 2 * rows * outputs, 4 * rows * outputs, 1, False, False, rows * outputs
        )


class Scaled(nn.Module):
    """A linear with its adapter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.gain = nn.ParameterDict(
            {ADAPTER_NAME: nn.Parameter(torch.zeros_like(linear.weight[:, 0]))}
        )

    def forward(self, x: torch.Tensor) -> Any:
        return self.base_layer(x) * (1 + self.gain[ADAPTER_NAME])


def attach(
    module: nn.Module, specs: Mapping[str, AdapterSpec], *, dropout: float, kernel: str
) -> None:
    for path in specs:
        holder, _, name = path.rpartition(".")
        setattr(module.get_submodule(holder), name, Scaled(module.get_submodule(path)))


def attached(module: nn.Module) -> dict[str, nn.Module]:
    return {path: m for path, m in module.named_modules() if isinstance(m, Scaled)}


def check(path: str, linear: nn.Module, spec: AdapterSpec) -> None:
    """Check nothing: every linear has one gain."""


def initial(name: str, leaf: str, shape: Shape, spec: AdapterSpec, cycle: int,
            weight: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(shape)


def effective(
    weight: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec
) -> torch.Tensor:
    return weight.float() * (1 + values["gain"].float())[:, None]


def register() -> None:
    """Register both halves as the kind "toy"."""
    import support.toy_kind as half

    KINDS["toy"] = ToyKind()
    HALVES["toy"] = half
