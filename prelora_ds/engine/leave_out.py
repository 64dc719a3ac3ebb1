"""Leaving one update out, by the way DeepSpeed itself takes when a gradient overflows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def update_left_out(optimizer: Any) -> Iterator[None]:
    """A context in which the optimizer's step drops its gradients and moves no weight, moment or Adam step."""

    def overflow(*_: Any, **__: Any) -> bool:
        optimizer.overflow = True
        return True

    with contextlib.ExitStack() as stack:
        if hasattr(optimizer, "overflow_checker"):  # stage 0
            stack.enter_context(_with(optimizer.overflow_checker, "check", overflow))
        elif hasattr(optimizer, "_overflow_check_and_loss_scale_update"):  # stage 3; BF16 does not call check_overflow
            stack.enter_context(_with(optimizer, "_overflow_check_and_loss_scale_update", overflow))
        elif hasattr(optimizer, "get_grads_for_norm"):  # stage 1 with fp32 accumulation
            nan = torch.full((1,), float("nan"), device=optimizer.fp32_groups_flat_partition[0].device)
            stack.enter_context(_with(optimizer, "get_grads_for_norm", lambda **_: ([nan], {})))
        else:
            stack.enter_context(_with(optimizer, "check_grad_overflow", True))
            stack.enter_context(_with(optimizer, "check_overflow", overflow))
        yield


@contextlib.contextmanager
def _with(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = dict(vars(owner))
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own[name]) if name in own else delattr(owner, name)
