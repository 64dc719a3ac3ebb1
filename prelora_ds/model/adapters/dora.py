"""The computing half of DoRA (Liu et al. 2024), in a linear of our own.

y = c * (x W^T + s (x A^T) B^T) + bias, with c = m / n, where n [out] holds the norms of the rows of W + s B A. In the
backward pass n is a constant (section 4.3 of the paper).

n depends on the weights only, so it is computed once per optimizer step. peft computes it in each forward pass, from a
matrix of the size of W. n is rounded to the type of m: at first both are the norms of W, so c is exactly 1 and the
outputs stay bitwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from torch import nn
from torch.autograd.function import once_differentiable

from prelora_ds.core.adapters import AdapterSpec, Dora, Shape
from prelora_ds.model.adapters import lora
from prelora_ds.model.adapters.half import OwnHalf, for_peft
from prelora_ds.model.adapters.linear import OwnLinear, blocks_of_rows, exact_type
from prelora_ds.model.products import over_tokens, widened


class DoraLinear(OwnLinear):
    """A linear with DoRA.

    norm: the norms n in fp32 [out]; None if they have to be computed in the next forward pass, in which also ZeRO
        stage 3 holds the whole weight.
    """

    norm: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, m = self.leaves(Dora.A, Dora.B, Dora.M)
        linear = self.base_layer
        if self.norm is None:
            self.norm = _row_norms(linear.weight, a, b, self.spec.scaling, m.dtype)
        output: torch.Tensor = _DoraProduct.apply(x, linear.weight, linear.bias, a, b, m, self.norm, self.spec.scaling)
        self.count_importance(output)
        return output

    def refresh(self, *, inactive: bool = False) -> None:
        self.norm = None  # also if the adapter is inactive, because the weight may train

    def besides_leaves(self) -> list[torch.Tensor]:
        return [] if self.norm is None else [self.norm]


@torch.no_grad()
def _row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float,
               dtype: torch.dtype) -> torch.Tensor:
    """Return the norms of the rows of W + s B A [out], rounded to ``dtype``, without a matrix of W's size for B A.

    |W + s B A|^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B, row by row.
    """
    exact = exact_type(weight.dtype)
    w, a, b = weight.to(exact), a.to(exact), b.to(exact)
    square = w.square().sum(1) + 2 * scaling * ((w @ a.t()) * b).sum(1)
    square += scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
    return square.clamp_min(0).sqrt().to(dtype).to(exact)


def _ratio(m: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Return c = m / n in the type of n, but at least 2^-20, so that the bias can be divided by it.

    A row of zeros has m = n = 0, and stays zero.
    """
    c = m.to(norm.dtype) / norm.where(norm > 0, 1)
    return c.where(c.abs() > 2**-20, 2**-20)


def _column_sums(grad: torch.Tensor, y: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums over the rows of ``grad`` and of ``grad * y``, in ``dtype``; the latter is 0 without ``y``.

    A GPU converts what it sums as it reads, without a copy; each product is rounded to the type of ``grad`` there.
    """
    sums, products = grad.new_zeros(2, grad.shape[1], dtype=dtype)
    if grad.device.type != "cpu":
        return grad.sum(0, dtype=dtype), products if y is None else (grad * y).sum(0, dtype=dtype)
    for part, outputs in blocks_of_rows(grad, grad if y is None else y):
        part = part.to(dtype)
        sums += part.sum(0)
        if y is not None:
            products += (part * outputs).sum(0)
    return sums, products


class _DoraProduct(torch.autograd.Function):
    """The output of a linear with DoRA, in the notation of the module's docstring. h is x A^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        m: torch.Tensor,
        norm: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        _, needs_w, _, needs_a, needs_b, needs_m, *_ = ctx.needs_input_grad
        c = _ratio(m, norm)
        # The bias is divided by c before all is multiplied by it. Where c is 1, y stays bitwise.
        y = nn.functional.linear(x, weight, None if bias is None else (bias / c).to(bias.dtype))
        flat_y = y.view(-1, y.shape[-1])
        for (part,) in blocks_of_rows(flat_y):
            part.mul_(c)
        h = nn.functional.linear(x, a)
        flat_y.addmm_(h.view(-1, h.shape[-1]), (b * c[:, None]).to(b.dtype).t(), alpha=scaling)

        # The output is kept for the gradient of m. Attention and GELU keep the outputs of q, k, v and fc1 anyway.
        ctx.save_for_backward(x if needs_w or needs_a else None, h if needs_b else None, y if needs_m else None,
                              weight, bias, a, b, m, norm)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, y, weight, bias, a, b, m, norm = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_a, needs_b, needs_m, *_ = ctx.needs_input_grad
        s = ctx.scaling
        flat = grad.reshape(-1, grad.shape[-1])
        flat_x: Any = None if x is None else x.reshape(-1, x.shape[-1])  # kept whenever it is used
        g, flat_x, h, wide_a = widened(flat, flat_x, h, a)
        grad_x = grad_w = grad_a = grad_b = grad_m = None
        grad_bias: Any = None

        # Scale the matrices by c, and not the gradient, which has a row for each token.
        c = _ratio(m, norm)[:, None]
        if needs_x or needs_a:
            (scaled_b,) = widened((b * c).to(b.dtype))
            gb = g @ scaled_b  # [tokens, rank]
        if needs_x:
            (wide_w,) = widened(weight)
            scaled = torch.empty_like(wide_w)
            for part, rows, factors in blocks_of_rows(scaled, wide_w, c):
                torch.mul(rows, factors, out=part)
            grad_x = (g @ scaled).addmm_(gb, wide_a, alpha=s).to(grad.dtype).view(*grad.shape[:-1], -1)
        if needs_w:
            grad_w = (g.t() @ flat_x).mul_(c).to(grad.dtype)
        if needs_a:
            grad_a = over_tokens(gb, flat_x).mul_(s).to(grad.dtype)
        if needs_b:
            grad_b = over_tokens(g, h.view(-1, h.shape[-1])).mul_(s * c).to(grad.dtype)
        if needs_bias or needs_m:
            grad_bias, sums = _column_sums(flat, y.view(-1, y.shape[-1]) if needs_m else None, norm.dtype)
        if needs_m:  # the output without the bias is proportional to m
            if bias is not None:
                sums -= bias * grad_bias
            grad_m = (sums / m.to(norm.dtype).where(m != 0, 1)).to(m.dtype)
        grad_bias = grad_bias.to(bias.dtype) if needs_bias else None
        return grad_x, grad_w, grad_bias, grad_a, grad_b, grad_m, None, None


class DoraHalf(OwnHalf):
    """The computing half of DoRA. Its linears have neither dropout nor another kernel."""

    linear = DoraLinear

    def initial(self, name: str, leaf: str, shape: Shape, spec: AdapterSpec, cycle: int,
                weight: torch.Tensor | None) -> torch.Tensor:
        """Return the fp32 first value of ``name``: A and B as in LoRA, m the norms of the rows of ``weight``."""
        if leaf != Dora.M:
            return lora.initial(name, leaf, shape, spec, cycle)
        assert weight is not None
        nothing = weight.new_zeros(weight.shape[0], 1), weight.new_zeros(1, weight.shape[1])
        return _row_norms(weight, nothing[1], nothing[0], spec.scaling, torch.float32)

    def effective(
        self, weight: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec
    ) -> torch.Tensor:
        """Return m / n (W + s B A), in fp32, or in float64 for a weight [out, in] in float64.

        As in the forward pass, n is rounded to the type of m.
        """
        exact = exact_type(weight.dtype)
        a, b, m = (values[leaf] for leaf in (Dora.A, Dora.B, Dora.M))
        whole = torch.addmm(weight.to(exact), b.to(exact), a.to(exact), alpha=spec.scaling)
        norm = torch.linalg.vector_norm(whole, dim=1).to(m.dtype).to(exact)
        return whole.mul_(_ratio(m, norm)[:, None])

    def in_peft(self, specs: Mapping[str, AdapterSpec], values: Mapping[str, torch.Tensor],
                dropout: float) -> tuple[PeftLoraConfig, dict[str, torch.Tensor]]:
        """Return peft's config of the adapters, and their parameters by name; see lora.py."""
        config, adapters = lora.in_peft(specs, values, dropout)
        config.use_dora = True
        return config, adapters | for_peft(values, (f"{path}.{Dora.M}" for path in specs))
