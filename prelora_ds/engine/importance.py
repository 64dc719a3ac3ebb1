"""The importance of adapters (DynaLoRA): the norms of what their linears return, summed over training samples."""

from __future__ import annotations

import torch
from deepspeed import comm
from torch import nn

from prelora_ds.model.adapters.lora import LoraLinear


def measure_importance(module: nn.Module, *, on: bool) -> None:
    """Let the linears of ``module`` measure from the next forward pass on, or stop them."""
    for linear in _linears(module).values():
        a, _ = linear.lora_weights
        linear.importance = torch.zeros((), dtype=torch.float64, device=a.device) if on else None


def take_importance(module: nn.Module) -> dict[str, float]:
    """Return what was measured since the last call, summed over ranks, by the path of the linear. Collective.

    It is {} if nothing is measured. A sum over samples depends neither on the number of ranks nor on the micro-batch,
    up to the order of summation in fp64.
    """
    measured = {path: linear.importance for path, linear in _linears(module).items() if linear.importance is not None}
    if not measured:
        return {}
    total = torch.stack(list(measured.values()))
    comm.all_reduce(total)
    for value in measured.values():
        value.zero_()
    return dict(zip(measured, total.tolist(), strict=True))


def _linears(module: nn.Module) -> dict[str, LoraLinear]:
    return {path: m for path, m in module.named_modules() if isinstance(m, LoraLinear)}
