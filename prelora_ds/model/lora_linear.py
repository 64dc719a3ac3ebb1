"""The fast LoRA linear: peft's layout and names, with a forward and backward pass of its own.

peft's own forward stores the input twice over, leaves the branch's output to autograd, and with fp32 adapters casts the
whole input. Here the branch is added into the output of the frozen linear, and backward computes and stores what
somebody asked for: no gradient of a frozen weight, and for an adapter that is inactive nothing at all.

y = x W^T + bias + s (x A^T) B^T, with x [..., in], W [out, in], A [rank, in], B [out, rank] (LoRA, Hu et al. 2021).

branch: the product above.
merged: one GEMM on bf16(W + s B A), merged once per optimizer step from an fp32 base (a merge into bf16(W) would round
    most of B A away); backward has skinny products only beside it. For a W that is frozen and whole on this rank.
fa: the branch with A frozen (LoRA-FA, Zhang et al. 2023): backward needs x A^T and no x.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.autograd.function import once_differentiable

ADAPTER_NAME = "default"


class LoraLinear(PeftLinear):
    """peft's ``lora.Linear`` of one adapter. With dropout, or merged or disabled through peft, it runs peft's code.

    active: whether the adapter trains now; an inactive one still adds its branch.
    base: the fp32 W while the weight holds W + s B A, else None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.active, self.base = True, None

    base: torch.Tensor | None

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A [rank, in] and B [out, rank]."""
        return self.lora_A[ADAPTER_NAME].weight, self.lora_B[ADAPTER_NAME].weight

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dropout = self.lora_dropout[ADAPTER_NAME]
        if self.base is None and (self.disable_adapters or self.merged
                                  or (self.training and not isinstance(dropout, nn.Identity))):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        a, b = self.factors
        if not self.active:
            a, b = a.detach(), b.detach()
        linear = self.get_base_layer()
        return _LoraProduct.apply(x, linear.weight, linear.bias, a, b,  # type: ignore[no-any-return, no-untyped-call]
                                  self.scaling[ADAPTER_NAME], self.base is not None)

    def keep_base(self) -> None:
        """Begin to train merged: from now on the weight is what `merge_base` writes."""
        weight = self.get_base_layer().weight
        self.base = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)

    @torch.no_grad()
    def merge_base(self) -> None:
        """Write bf16(W + s B A), summed in fp32, into the weight."""
        a, b = self.factors
        assert self.base is not None
        self.get_base_layer().weight.data.copy_(
            torch.addmm(self.base, b.float(), a.float(), alpha=self.scaling[ADAPTER_NAME]))


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor,
                b: torch.Tensor, scaling: float, merged: bool) -> torch.Tensor:
        _, needs_w, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        y, h = nn.functional.linear(x, weight, bias), None
        # Merged, x A^T serves the gradient of B alone, and where x is kept for A it can wait for backward.
        if not merged or (needs_b and not needs_a):
            h = nn.functional.linear(x, a)
        if not merged:
            y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b.t(), alpha=scaling)
        ctx.save_for_backward(x if needs_w or needs_a else None, h if needs_b else None, weight, a, b)
        ctx.scaling, ctx.merged = scaling, merged
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, weight, a, b = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
        s, g = ctx.scaling, grad.reshape(-1, grad.shape[-1])
        flat = None if x is None else x.reshape(-1, x.shape[-1])
        grad_x = grad_w = grad_bias = grad_a = grad_b = None
        if needs_a or (needs_x and not ctx.merged):
            gb = g @ b  # [tokens, rank]
        if needs_x:
            grad_x = g @ weight
            if not ctx.merged:
                grad_x.addmm_(gb, a, alpha=s)
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        if needs_w:
            grad_w = g.t() @ flat
        if needs_bias:
            grad_bias = g.sum(0)
        if needs_a:
            grad_a = (gb.t() @ flat).mul_(s)
        if needs_b:
            h = flat @ a.t() if h is None else h.view(-1, h.shape[-1])
            grad_b = (g.t() @ h).mul_(s)
        return grad_x, grad_w, grad_bias, grad_a, grad_b, None, None


def lora_linears(module: nn.Module) -> Iterator[LoraLinear]:
    """The fast LoRA linears of ``module``."""
    return (m for m in module.modules() if isinstance(m, LoraLinear))


def merge_bases(module: nn.Module, *, inactive: bool = False) -> None:
    """Bring the weights of all linears that train merged up to their adapters; once per optimizer step.

    An inactive adapter stands still, so its linear is passed over but for ``inactive``, after base or adapters have
    been written from outside.
    """
    for linear in lora_linears(module):
        if linear.base is not None and (linear.active or inactive):
            linear.merge_base()
