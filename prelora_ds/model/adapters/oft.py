"""The computing half of OFT (Qiu et al. 2023, 2025), in a linear of our own.

y = (x R) W^T + bias, where R is a block-diagonal rotation of the inputs.

Each block of R is the sum of the first terms of the Cayley transform (I + Q) (I - Q)^-1 of a skew-symmetric Q, in which
peft's default stops: I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4. It is computed in fp32, because it is near the identity, and
rounded for the product with x. The backward pass computes x R again instead of keeping it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import OFTConfig as PeftOftConfig
from torch import nn
from torch.autograd.function import once_differentiable

from prelora_ds.core.adapters import AdapterSpec, Oft, rank_of
from prelora_ds.model.adapters.half import OwnHalf, for_peft
from prelora_ds.model.adapters.linear import OwnLinear, exact_type


class OftLinear(OwnLinear):
    """A linear with OFT."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (q,) = self.leaves(Oft.Q)
        linear = self.base_layer
        output: torch.Tensor = _OftProduct.apply(x, linear.weight, linear.bias, q, rank_of(self.spec))
        self.count_importance(output)
        return output


def rotations(q: torch.Tensor, size: int) -> torch.Tensor:
    """Return the blocks of R [blocks, size, size] in fp32, or in float64 for float64.

    q: the elements above the diagonal of each Q, row by row [blocks, size (size - 1) / 2].
    """
    exact = q.to(exact_type(q.dtype))
    upper = torch.zeros(len(q), size, size, dtype=exact.dtype, device=q.device)
    rows, columns = torch.triu_indices(size, size, 1, device=q.device)
    upper[:, rows, columns] = exact
    skew = upper - upper.transpose(1, 2)
    square = skew @ skew
    identity = torch.eye(size, dtype=exact.dtype, device=q.device)
    return identity + 2 * (skew + square + square @ skew) + square @ square


class _OftProduct(torch.autograd.Function):
    """The output of a linear with OFT, in the notation of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        q: torch.Tensor,
        size: int,
    ) -> torch.Tensor:
        _, needs_w, _, needs_q, _ = ctx.needs_input_grad
        # DeepSpeed's linear of ZeRO stage 3 rounds an input of another shape otherwise.
        turned = _turned(x, rotations(q, size).to(x.dtype)).view(x.shape)
        y = nn.functional.linear(turned, weight, bias)
        ctx.save_for_backward(x if needs_w or needs_q else None, weight, q)
        ctx.size = size
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, q = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_q, _ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_w = grad_bias = grad_q = None
        with torch.enable_grad():
            source = q.detach().requires_grad_(needs_q)
            blocks = rotations(source, ctx.size)
        r = blocks.detach().to(grad.dtype)

        if needs_x or needs_q:
            into_turned = g @ weight
        if needs_x:
            grad_x = _turned(into_turned, r.transpose(1, 2)).view(*grad.shape[:-1], -1)
        if needs_w:
            grad_w = g.t() @ _turned(x, r)
        if needs_bias:
            grad_bias = g.sum(0)
        if needs_q:
            grad_r = _by_block(x, ctx.size).transpose(1, 2) @ _by_block(into_turned, ctx.size)
            (grad_q,) = torch.autograd.grad(blocks, source, grad_r.to(blocks.dtype))
        return grad_x, grad_w, grad_bias, grad_q, None


def _by_block(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return the tokens of ``x`` [..., in] by block [blocks, tokens, size]."""
    return x.reshape(-1, x.shape[-1] // size, size).transpose(0, 1)


def _turned(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return x R [tokens, in]."""
    return (_by_block(x, blocks.shape[1]) @ blocks).transpose(0, 1).reshape(-1, x.shape[-1])


class OftHalf(OwnHalf):
    """The computing half of OFT. Its linears have neither dropout nor another kernel."""

    linear = OftLinear

    def effective(
        self, weight: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec
    ) -> torch.Tensor:
        """Return W R^T in fp32, or in float64 for a weight [out, in] in float64."""
        exact = exact_type(weight.dtype)
        blocks = rotations(values[Oft.Q].to(exact), rank_of(spec))
        return _turned(weight.to(exact), blocks.transpose(1, 2))

    def in_peft(self, specs: Mapping[str, AdapterSpec], values: Mapping[str, torch.Tensor],
                dropout: float) -> tuple[PeftOftConfig, dict[str, torch.Tensor]]:
        """Return peft's config of the adapters, and their parameters by name; see lora.py."""
        config = PeftOftConfig(target_modules=sorted(specs), r=0, oft_block_size=rank_of(next(iter(specs.values()))))
        return config, for_peft(values, (f"{path}.{Oft.Q}" for path in specs))
