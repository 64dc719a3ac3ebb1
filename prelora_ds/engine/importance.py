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
from prelora_ds.model.adapters.linear import AdaptedLinear, adapted_linears

if TYPE_CHECKING:
    from prelora_ds.engine.engine import Engine


def measure_outputs(module: nn.Module, *, on: bool) -> None:
    """Let the linears of ``module`` with adapters measure their outputs from the next forward pass on, or stop them."""
    for _, linear in adapted_linears(module):
        device = next(linear.parameters()).device
        linear.importance = torch.zeros((), dtype=torch.float64, device=device) if on else None


def parts_of_importance(engine: Engine, kind: Measured | None) -> dict[str, torch.Tensor]:
    """Return adapter -> this rank's part of its importance in a step, an fp64 scalar on the engine's device.

    Call it between the backward pass and the optimizer step. The sums of the parts over all ranks go to
    `importance_of`. They depend neither on the number of ranks nor on the micro-batch, up to the order of summation.
    """
    if kind == "forward":
        return {path: _taken(linear) for path, linear in adapted_linears(engine.module)}
    if kind == "backward":
        return _squares_of_gradients(engine)
    return {}


def importance_of(kind: Measured | None, sums: Mapping[str, float]) -> dict[str, float]:
    """Return the importance in a step from the ``sums`` of its parts over all ranks."""
    return {path: math.sqrt(total) for path, total in sums.items()} if kind == "backward" else dict(sums)


def _taken(linear: AdaptedLinear) -> torch.Tensor:
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
