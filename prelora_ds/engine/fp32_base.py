"""A live engine with quantised weights computes with their fp32 values for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from prelora_ds.engine.engine import Engine
from prelora_ds.engine.values import FullValues
from prelora_ds.model.adapters import quantised_linears


@dataclass(frozen=True)
class _AsItWas:
    """The BF16 value of a weight that was not quantised, in the place of a quantised one."""

    weight: torch.Tensor

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)

    def parts(self) -> list[torch.Tensor]:
        return [self.weight]


@contextlib.contextmanager
def on_fp32_base(engine: Engine) -> Iterator[None]:
    """Within the context ``engine`` computes with BF16(W) of the fp32 weights W that it has quantised. Collective.

    Every rank then holds 2 more bytes per element of these weights.
    """
    values = FullValues(engine)
    linears = quantised_linears(engine.module)
    before = {name: linear.quantised for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            linear.quantised = _AsItWas(values.of(name).bfloat16())
        yield
    finally:
        for name, linear in linears.items():
            linear.quantised = before[name]
