"""What the computing halves of kinds with a linear of our own have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from prelora_ds.core.adapters import AdapterSpec, Shape
from prelora_ds.model.adapters.linear import OwnLinear, adapted_linears

PEFT_PREFIX = "base_model.model."  # before the names of a model's parameters in peft's files

Maker = Callable[[nn.Linear, AdapterSpec], OwnLinear]


class OwnHalf(ABC):
    """What the computing halves of kinds with a linear of our own share; lora.py documents each function.

    linear: the class of the linears.
    """

    linear: type[OwnLinear]

    def maker(self, module: nn.Module, specs: Mapping[str, AdapterSpec]) -> Maker:
        """Return what makes a linear with an adapter, for the linears ``specs`` of ``module``."""
        return self.linear

    def attach(
        self, module: nn.Module, specs: Mapping[str, AdapterSpec], *, dropout: float, kernel: str
    ) -> None:
        """Replace each linear of ``module`` that ``specs`` names.

        Raises ValueError for a path that is not that of a linear.
        """
        make = self.maker(module, specs)
        for path, spec in specs.items():
            holder, _, name = path.rpartition(".")
            try:
                linear = module.get_submodule(path)
            except AttributeError as exc:
                raise ValueError(f"{path} is not found in the model") from exc
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"{path} is not a linear")
            setattr(module.get_submodule(holder), name, make(linear, spec))

    def attached(self, module: nn.Module) -> dict[str, nn.Module]:
        return {path: linear for path, linear in adapted_linears(module) if isinstance(linear, self.linear)}

    def check(self, path: str, linear: nn.Module, spec: AdapterSpec) -> None:
        assert isinstance(linear, OwnLinear)
        if linear.spec != spec:
            raise RuntimeError(f"{path}: {linear.spec} realised, {spec} planned")

    def initial(
        self, name: str, leaf: str, shape: Shape, spec: AdapterSpec, cycle: int, weight: torch.Tensor | None
    ) -> torch.Tensor:
        return torch.zeros(shape)

    @abstractmethod
    def effective(
        self, weight: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec
    ) -> torch.Tensor: ...

    @abstractmethod
    def in_peft(
        self, specs: Mapping[str, AdapterSpec], values: Mapping[str, torch.Tensor], dropout: float
    ) -> tuple[Any, dict[str, torch.Tensor]]: ...


class AddingHalf(OwnHalf):
    """The computing half of a kind that adds a matrix of its own to the weight, of which `product` returns rows."""

    @abstractmethod
    def product(
        self, values: Mapping[str, torch.Tensor], spec: AdapterSpec, weight: Shape, rows: slice
    ) -> torch.Tensor: ...

    def effective(
        self, weight: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec
    ) -> torch.Tensor:
        exact = {leaf: value.float() for leaf, value in values.items()}
        return weight.float() + self.product(exact, spec, tuple(weight.shape), slice(None))


def for_peft(values: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return the ``values`` of parameters of adapters whose names are peft's but for a prefix, by peft's ``names``."""
    return {f"{PEFT_PREFIX}{name}": values[name] for name in names}
