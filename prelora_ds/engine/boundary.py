"""Cut the autograd graph between a model's outputs and what a user's loop computes from them.

A loop keeps tensors from step to step, such as the loss and the logits. Their graph would refer to the parameters, and
by the hooks of DeepSpeed 0.19 to the engine (runtime/engine.py, forward: register_output_backward_hooks), so that the
engine could not be freed when its phase ends. Therefore the loop gets copies of the outputs, which share their memory
and whose graph ends at the boundary. Its backward pass stops there, and the engine's continues with the same gradients.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn


class Passed:
    """The outputs that have passed the boundary, and the gradients that have come back."""

    def __init__(self) -> None:
        self._outputs: dict[int, torch.Tensor] = {}
        self._gradients: dict[int, torch.Tensor] = {}
        self._count = 0

    def across(self, outputs: Any) -> Any:
        """Return the outputs of a model as the loop sees them: tensors, or containers or dataclasses of tensors."""
        return _mapped(outputs, self._tensor_across)

    def _tensor_across(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        self._count += 1
        self._outputs[self._count] = tensor
        anchor = torch.zeros((), requires_grad=True)
        passed: torch.Tensor = _Boundary.apply(self, self._count, anchor, tensor.detach())
        return passed

    def receive(self, number: int, gradient: torch.Tensor) -> None:
        """Take the gradient of an output, unless the output has been dropped."""
        if number in self._outputs:
            self._gradients[number] = gradient

    def take(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return and drop the outputs whose gradients have come back, and these gradients."""
        numbers = sorted(self._gradients)
        gradients = [self._gradients.pop(number) for number in numbers]
        return [self._outputs.pop(number) for number in numbers], gradients

    def drop(self) -> None:
        """Drop all outputs, so that nothing refers to their graph."""
        self._outputs.clear()
        self._gradients.clear()


class _Boundary(torch.autograd.Function):
    """The identity, whose backward pass hands the gradient to `Passed`. The anchor lets the result require one."""

    @staticmethod
    def forward(ctx: Any, passed: Passed, number: int, anchor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.passed = passed
        ctx.number = number
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:
        ctx.passed.receive(ctx.number, gradient)
        return None, None, None, None


def seeded(outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a scalar whose backward pass begins with these ``gradients`` of ``outputs``.

    It does not scale them by the scalar's own gradient, which is 1 because BF16 has no loss scale.
    """
    scalar: torch.Tensor = _Seeded.apply(gradients, *outputs)
    return scalar


class _Seeded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Sequence[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.gradients


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor], seen: dict[int, Any] | None = None) -> Any:
    """Return ``value`` with all tensors changed that are in its containers, dataclasses and objects.

    Objects are copied attribute by attribute, such as the caches of keys and values that transformers' decoders return.

    seen: id of an object -> its copy, for objects that refer to each other.
    """
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        return change(value)
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Mapping):  # also the outputs of transformers
        changed: Any = copy.copy(value)
        for key, item in value.items():
            changed[key] = _mapped(item, change, seen)
        return changed
    if isinstance(value, list | tuple):
        items = [_mapped(item, change, seen) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, type | nn.Module) or callable(value):
        return value
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()  # a dataclass may have slots
    names = {*(field.name for field in fields), *getattr(value, "__dict__", ())}
    if not names:
        return value
    changed = seen[id(value)] = copy.copy(value)
    for name in names:
        object.__setattr__(changed, name, _mapped(getattr(value, name), change, seen))
    return changed
