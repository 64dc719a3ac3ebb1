"""The computing half of IA3 (Liu et al. 2022), in a linear of our own.

y = (1 + g) * (x W^T + bias), with the gains g [out]. peft's parameter is 1 + g.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import IA3Config as PeftIA3Config
from torch import nn
from torch.autograd.function import once_differentiable

from prelora_ds.core.adapters import IA3, AdapterSpec
from prelora_ds.model.adapters.half import PEFT_PREFIX, OwnHalf
from prelora_ds.model.adapters.linear import OwnLinear, exact_type


class IA3Linear(OwnLinear):
    """A linear with IA3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (gain,) = self.leaves(IA3.GAIN)
        linear = self.base_layer
        output: torch.Tensor = _IA3Product.apply(x, linear.weight, linear.bias, gain)
        self.count_importance(output)
        return output


class _IA3Product(torch.autograd.Function):
    """The output of a linear with IA3, in the notation of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gain: torch.Tensor
    ) -> torch.Tensor:
        _, needs_w, _, needs_gain = ctx.needs_input_grad
        y = nn.functional.linear(x, weight, bias)
        y.addcmul_(y, gain)  # rounds once, unlike a product with 1 + g

        # The output is kept for the gradient of g. Attention and GELU keep the outputs of q, k, v and fc1 anyway.
        ctx.save_for_backward(x if needs_w else None, y if needs_gain else None, weight, gain)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y, weight, gain = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_gain = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        factors = 1 + gain.to(exact_type(gain.dtype))
        grad_x = grad_w = grad_bias = grad_gain = None

        # Scale the matrices, and not the gradient, which has a row for each token.
        if needs_x:
            scaled = torch.mul(weight, factors[:, None], out=torch.empty_like(weight))
            grad_x = (g @ scaled).view(*grad.shape[:-1], -1)
        if needs_w:
            grad_w = (g.t() @ x.reshape(-1, x.shape[-1])).mul_(factors[:, None])
        if needs_bias:
            grad_bias = g.sum(0, dtype=factors.dtype).mul_(factors).to(grad.dtype)
        if needs_gain:  # the output is proportional to 1 + g
            sums = (g * y.view(-1, y.shape[-1])).sum(0, dtype=factors.dtype)
            grad_gain = (sums / factors.where(factors != 0, 1)).to(gain.dtype)
        return grad_x, grad_w, grad_bias, grad_gain


class IA3Half(OwnHalf):
    """The computing half of IA3. Its linears have neither dropout nor another kernel."""

    linear = IA3Linear

    def effective(
        self, weight: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec
    ) -> torch.Tensor:
        """Return (1 + g) W in fp32, or in float64 for a weight [out, in] in float64."""
        exact = exact_type(weight.dtype)
        return weight.to(exact) * (1 + values[IA3.GAIN].to(exact))[:, None]

    def effective_bias(
        self, bias: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec
    ) -> torch.Tensor:
        """Return (1 + g) bias in fp32."""
        return bias.float() * (1 + values[IA3.GAIN].float())

    def in_peft(self, specs: Mapping[str, AdapterSpec], values: Mapping[str, torch.Tensor],
                dropout: float) -> tuple[PeftIA3Config, dict[str, torch.Tensor]]:
        """Return peft's config of the adapters, and their parameters by peft's names; see lora.py."""
        config = PeftIA3Config(target_modules=sorted(specs), feedforward_modules=[])
        factors = {path: 1 + values[f"{path}.{IA3.GAIN}"] for path in specs}
        return config, {f"{PEFT_PREFIX}{path}.ia3_l": each[:, None] for path, each in factors.items()}
