"""The importance of adapters (DynaLoRA), measured in each optimizer step.

Forward: the norms of what their linears return, summed over training samples. Backward: the norms of their gradients,
averaged over the global batch and not clipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from deepspeed import comm
from torch import nn

from prelora_ds.core.selection import Measured
from prelora_ds.engine.fragments import gradients
from prelora_ds.model.adapters.lora import LoraLinear

if TYPE_CHECKING:
    from prelora_ds.engine.engine import Engine


def measure_outputs(module: nn.Module, *, on: bool) -> None:
    """Let the linears of ``module`` with adapters measure their outputs from the next forward pass on, or stop them."""
    for linear in _linears(module).values():
        a, _ = linear.lora_weights
        linear.importance = torch.zeros((), dtype=torch.float64, device=a.device) if on else None


def parts_of_importance(engine: Engine, kind: Measured | None) -> dict[str, torch.Tensor]:
    """Return adapter -> this rank's part of its importance in a step, an fp64 scalar on the engine's device.

    Call it between the backward pass and the optimizer step. The sums of the parts over all ranks go to
    `importance_of`. They depend neither on the number of ranks nor on the micro-batch, up to the order of summation.
    """
    if kind == "forward":
        return {path: _taken(linear) for path, linear in _linears(engine.module).items()}
    if kind == "backward":
        return _squares_of_gradients(engine)
    return {}


def importance_of(kind: Measured | None, sums: Mapping[str, float]) -> dict[str, float]:
    """Return the importance in a step from the ``sums`` of its parts over all ranks."""
    return {path: math.sqrt(total) for path, total in sums.items()} if kind == "backward" else dict(sums)


def _taken(linear: LoraLinear) -> torch.Tensor:
    """Return what ``linear`` has measured, and let it begin at 0 again."""
    measured = linear.importance
    assert measured is not None
    linear.importance = torch.zeros_like(measured)
    return measured


def _squares_of_gradients(engine: Engine) -> dict[str, torch.Tensor]:
    plan = engine.plan
    leaves = plan.leaves(engine.layout)
    training = plan.training()
    device = engine.ds.device
    squares = {path: torch.zeros((), dtype=torch.float64, device=device) for path in plan.adapters}
    if engine.ds.zero_optimization_stage() == 0 and comm.get_rank() > 0:
        return squares  # every rank holds all gradients, so that only one of them may count
    for fragment, gradient in gradients(engine.ds):
        if fragment.name in leaves and fragment.name in training:
            path, _ = leaves[fragment.name]
            squares[path] += gradient.double().square().sum().to(device)
    return squares


def _linears(module: nn.Module) -> dict[str, LoraLinear]:
    return {path: m for path, m in module.named_modules() if isinstance(m, LoraLinear)}
