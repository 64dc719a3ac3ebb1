"""The computing half of MiSS (Kang and Yin 2024), in a linear of our own.

y = x W^T + bias + h D, with h [rank] the sums of the inputs whose positions differ by multiples of the rank, and
D [rank, out]. The backward pass needs no x, only h.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import MissConfig as PeftMissConfig
from torch import nn
from torch.autograd.function import once_differentiable

from prelora_ds.core.adapters import AdapterSpec, Miss, Shape, rank_of
from prelora_ds.model.adapters.half import AddingHalf, for_peft
from prelora_ds.model.adapters.linear import OwnLinear, exact_type
from prelora_ds.model.products import over_tokens


class MissLinear(OwnLinear):
    """A linear with MiSS."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (block,) = self.leaves(Miss.BLOCK)
        linear = self.base_layer
        output: torch.Tensor = _MissProduct.apply(x, linear.weight, linear.bias, block)
        self.count_importance(output)
        return output


class _MissProduct(torch.autograd.Function):
    """The output of a linear with MiSS, in the notation of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, block: torch.Tensor
    ) -> torch.Tensor:
        _, needs_w, _, needs_block = ctx.needs_input_grad
        y = nn.functional.linear(x, weight, bias)
        h = _folded(x, block.shape[0])
        y.view(-1, y.shape[-1]).addmm_(h, block)
        ctx.save_for_backward(x if needs_w else None, h if needs_block else None, weight, block)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, weight, block = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_block = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_w = grad_bias = grad_block = None

        if needs_x:
            grad_x = g @ weight
            _add_unfolded(grad_x, g @ block.t())
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        if needs_w:
            grad_w = g.t() @ x.reshape(-1, x.shape[-1])
        if needs_bias:
            grad_bias = g.sum(0)
        if needs_block:
            grad_block = over_tokens(h, g)
        return grad_x, grad_w, grad_bias, grad_block


def _folded(x: torch.Tensor, rank: int) -> torch.Tensor:
    """Return h [tokens, rank] in the type of ``x``, summed in fp32."""
    flat = x.reshape(-1, x.shape[-1])
    whole = flat.shape[1] // rank * rank
    h = flat[:, :whole].reshape(len(flat), -1, rank).sum(1, dtype=exact_type(x.dtype))
    h[:, : flat.shape[1] - whole] += flat[:, whole:]
    return h.to(x.dtype)


def _add_unfolded(into: torch.Tensor, h: torch.Tensor) -> None:
    """Add each element of ``h`` [n, rank] to the columns of ``into`` [n, in] that `_folded` sums."""
    rank = h.shape[1]
    whole = into.shape[1] // rank * rank
    into[:, :whole].unflatten(1, (-1, rank)).add_(h[:, None])
    into[:, whole:].add_(h[:, : into.shape[1] - whole])


class MissHalf(AddingHalf):
    """The computing half of MiSS. Its linears have neither dropout nor another kernel."""

    linear = MissLinear

    def product(
        self, values: Mapping[str, torch.Tensor], spec: AdapterSpec, weight: Shape, rows: slice
    ) -> torch.Tensor:
        """Return ``rows`` of what D adds to the weight, in the dtype of ``values``. weight: the shape of the weight."""
        of_rows = values[Miss.BLOCK].t()[rows]
        added = of_rows.new_zeros(len(of_rows), weight[1])
        _add_unfolded(added, of_rows)
        return added

    def in_peft(self, specs: Mapping[str, AdapterSpec], values: Mapping[str, torch.Tensor],
                dropout: float) -> tuple[PeftMissConfig, dict[str, torch.Tensor]]:
        """Return peft's config of the adapters, and their parameters by name; see lora.py."""
        config = PeftMissConfig(target_modules=sorted(specs), r=rank_of(next(iter(specs.values()))))
        return config, for_peft(values, (f"{path}.{Miss.BLOCK}" for path in specs))
