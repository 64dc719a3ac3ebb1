"""Read the norm of a step's gradients once, and skip the update if that norm is not finite.

Each read makes the host wait for its device, and DeepSpeed 0.19 reads more:

- At stage 0 it asks of each gradient whether it is finite (runtime/utils.py, CheckOverflow.has_overflow_serial), and
  takes the norm of each optimizer group to the host, to the device and back (get_weight_norm). One read for each group
  remains.
- At stage 2 it asks this once of all gradients, and reads the norm again for each optimizer group
  (runtime/zero/stage_1_and_2.py, has_overflow and unscale_and_clip_grads).
- At stages 2 and 3 it reads the norm to check it, and our engine reads it again for the log.

These reads are not needed. Every stage skips an update whose norm is not finite (stage 2 unless
`bf16.check_grad_overflow` is false), and one such gradient on one rank makes the norm of all ranks so.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import CheckOverflow
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from prelora_ds.engine.skip_update import replaced


class _ByNorm(CheckOverflow):  # type: ignore[misc]
    """The overflow check of stage 0. It finds none, because the norm decides."""

    def check(self, param_groups: Any = None) -> bool:
        return False


def norm_of_group(gradients: list[torch.Tensor], mpu: None = None) -> float:
    """Return the norm of an optimizer group's ``gradients`` with one read, or -1 if it is not finite.

    It has the bits of DeepSpeed's get_weight_norm. There is no model parallelism, so ``mpu`` is always None.
    """
    squares = sum(gradient.float().norm() ** 2.0 for gradient in gradients)
    norm = float(squares) ** 0.5
    return norm if math.isfinite(norm) else -1.0


class _Stage0(FP16_UnfusedOptimizer):  # type: ignore[misc]
    """The optimizer of stage 0, which reads the norm of each of its groups once."""

    def step(self, closure: Any = None) -> Any:
        with replaced(unfused_optimizer, "get_weight_norm", norm_of_group):
            return super().step(closure)


class _Stage2(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """The optimizer of stage 2, and of stage 1 with offload, with the norm on the host."""

    def scaled_global_norm(self, norm_type: int = 2) -> torch.Tensor:
        norm: torch.Tensor = super().scaled_global_norm(norm_type)
        return norm.cpu()

    def check_overflow(self, partition_gradients: bool = True) -> None:
        if self.cpu_offload:
            super().check_overflow(partition_gradients)

    def step(self, closure: Any = None) -> None:
        """Take a step, and drop all that has been reduced if its update is skipped.

        With offload DeepSpeed 0.19 keeps it and adds the next gradients to it (stage_1_and_2.py, `step`), so that every
        later update is skipped as well.
        """
        super().step(closure)
        if self.overflow and self.cpu_offload:
            for group in self.averaged_gradients:
                self.averaged_gradients[group] = None


class _Stage3(DeepSpeedZeroOptimizer_Stage3):  # type: ignore[misc]
    """The optimizer of stage 3, with the norms of its groups on the host."""

    def _get_norm_groups(self) -> list[torch.Tensor]:
        return list(torch.stack(super()._get_norm_groups()).cpu())


def read_norms_once(optimizer: Any) -> None:
    """Let ``optimizer``, one of DeepSpeed's, read each norm of a step once, and decide by it alone.

    At stage 0 there is a norm for each optimizer group, at the other stages one in all.
    """
    if type(optimizer) is FP16_UnfusedOptimizer:
        optimizer.overflow_checker.__class__ = _ByNorm
    for ours in (_Stage0, _Stage2, _Stage3):
        if type(optimizer) is ours.__bases__[0]:
            optimizer.__class__ = ours
