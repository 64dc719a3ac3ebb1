"""Read the norm of a step's gradients once, and let it alone decide whether they are finite.

Each read makes the host wait for its device, and DeepSpeed 0.19 reads more than it needs:

- at stage 0 whether each single gradient is finite (runtime/utils.py, CheckOverflow.has_overflow_serial);
- at stage 2 the same once for all, and the norm once more for each optimizer group (runtime/zero/stage_1_and_2.py,
  has_overflow and unscale_and_clip_grads).

Every stage also skips an update whose norm is not finite, which is so on all ranks if one gradient is not.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import CheckOverflow
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


class _ByNorm(CheckOverflow):  # type: ignore[misc]
    """That of stage 0, whose gradients are already the same on all ranks."""

    def check(self, param_groups: Any = None) -> bool:
        return False


class _Stage2(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """Also stage 1 with offload."""

    def scaled_global_norm(self, norm_type: int = 2) -> torch.Tensor:
        norm: torch.Tensor = super().scaled_global_norm(norm_type)
        return norm.cpu()

    def check_overflow(self, partition_gradients: bool = True) -> None:
        if self.cpu_offload:
            super().check_overflow(partition_gradients)


class _Stage3(DeepSpeedZeroOptimizer_Stage3):  # type: ignore[misc]
    def _get_norm_groups(self) -> list[torch.Tensor]:
        return list(torch.stack(super()._get_norm_groups()).cpu())


def read_norms_once(optimizer: Any) -> None:
    """Let ``optimizer``, one of DeepSpeed's, decide by the norm of a step's gradients, and read it once."""
    if type(optimizer) is FP16_UnfusedOptimizer:
        optimizer.overflow_checker.__class__ = _ByNorm
    for ours in (_Stage2, _Stage3):
        if type(optimizer) is ours.__bases__[0]:
            optimizer.__class__ = ours
