"""Skip one update through DeepSpeed's own gradient-overflow path."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_ABSENT = object()  # an attribute that the instance itself does not have


@contextlib.contextmanager
def skipping_update(optimizer: Any) -> Iterator[None]:
    """Let the optimizer's step drop its gradients and change no weight, moment or Adam step.

    Each wrapper of DeepSpeed 0.19 detects an overflow in its own way, so another method is replaced
    for each.
    """

    def overflow(*_: Any, **__: Any) -> bool:
        optimizer.overflow = True
        return True

    with contextlib.ExitStack() as stack:
        if hasattr(optimizer, "overflow_checker"):
            # Stage 0, FP16_UnfusedOptimizer.
            stack.enter_context(replaced(optimizer.overflow_checker, "check", overflow))
        elif hasattr(optimizer, "_overflow_check_and_loss_scale_update"):
            # Stage 3. In BF16 it does not call its check_overflow.
            stack.enter_context(
                replaced(optimizer, "_overflow_check_and_loss_scale_update", overflow)
            )
        elif hasattr(optimizer, "get_grads_for_norm"):
            # Stage 1 with fp32 accumulation, BF16_Optimizer: it skips a step whose norm is not
            # finite.
            device = optimizer.fp32_groups_flat_partition[0].device
            nan = torch.full((1,), float("nan"), device=device)
            stack.enter_context(replaced(optimizer, "get_grads_for_norm", lambda **_: ([nan], {})))
        else:
            # Stage 2, and stage 1 with offload, DeepSpeedZeroOptimizer.
            stack.enter_context(replaced(optimizer, "check_grad_overflow", True))
            stack.enter_context(replaced(optimizer, "check_overflow", overflow))
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of ``owner``, and restore the former state of its instance at the end."""
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
