"""The computing half of LoKr (Yeh et al. 2024), in a linear of our own.

y = x W^T + bias + s x (W1 x W2)^T, with the Kronecker product of W1 [out1, in1] and W2 [out2, in2].

peft builds the Kronecker product, which is as large as W, and has a gradient of that size. Here each token is a matrix
X [in1, in2], and its part of the output is W1 X W2^T [out1, out2]: two small products. The backward pass computes
X W2^T again instead of keeping it, because it is about as large as the output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoKrConfig as PeftLoKrConfig
from torch import nn
from torch.autograd.function import once_differentiable

from prelora_ds.core.adapters import AdapterSpec, LoKr, Shape, rank_of
from prelora_ds.model.adapters.half import AddingHalf, for_peft
from prelora_ds.model.adapters.linear import OwnLinear, generator_of


class LoKrLinear(OwnLinear):
    """A linear with LoKr."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w1, *factors = self.leaves(*self.leaf_names)
        linear = self.base_layer
        output: torch.Tensor = _LoKrProduct.apply(x, linear.weight, linear.bias, w1, _w2(factors), self.spec.scaling)
        self.count_importance(output)
        return output


def _w2(factors: list[torch.Tensor]) -> torch.Tensor:
    """Return W2, which is given whole or as two factors."""
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


class _LoKrProduct(torch.autograd.Function):
    """The output of a linear with LoKr, in the notation of the module's docstring. h is X W2^T [tokens, in1, out2]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        w1: torch.Tensor,
        w2: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        _, needs_w, _, needs_w1, needs_w2, _ = ctx.needs_input_grad
        y = nn.functional.linear(x, weight, bias)
        y.view(-1, w1.shape[0], w2.shape[0]).add_(_on_columns(w1, _h(x, w1, w2)), alpha=scaling)
        ctx.save_for_backward(x if needs_w or needs_w1 or needs_w2 else None, weight, w1, w2)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, w1, w2 = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_w1, needs_w2, _ = ctx.needs_input_grad
        s = ctx.scaling
        g = grad.reshape(-1, grad.shape[-1])
        matrices = g.view(-1, w1.shape[0], w2.shape[0])
        grad_x = grad_w = grad_bias = grad_w1 = grad_w2 = None

        if needs_x or needs_w2:
            into_h = _on_columns(w1.t(), matrices).reshape(-1, w2.shape[0])  # [tokens * in1, out2]
        if needs_x:
            grad_x = g @ weight
            grad_x.view(-1, w2.shape[1]).add_(into_h @ w2, alpha=s)
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        if needs_w:
            grad_w = g.t() @ x.reshape(-1, x.shape[-1])
        if needs_bias:
            grad_bias = g.sum(0)
        if needs_w2:
            grad_w2 = (into_h.t() @ x.reshape(-1, w2.shape[1])).mul_(s)
        if needs_w1:
            grad_w1 = (_rows_first(matrices) @ _rows_first(_h(x, w1, w2)).t()).mul_(s)
        return grad_x, grad_w, grad_bias, grad_w1, grad_w2, None


# torch.matmul joins the rows of a stack of matrices only if the other factor requires a gradient (torch 2.14,
# should_fold), so that an adapter that does not train now would round otherwise. Here the rows are always joined.

def _h(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Return X W2^T of each token [tokens, in1, out2]."""
    return (x.reshape(-1, w2.shape[1]) @ w2.t()).view(-1, w1.shape[1], w2.shape[0])


def _on_columns(factor: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Return ``factor`` [n, rows] times each of ``matrices`` [tokens, rows, columns]: [tokens, n, columns]."""
    tokens, rows, columns = matrices.shape
    product = matrices.transpose(1, 2).reshape(-1, rows) @ factor.t()
    return product.view(tokens, columns, -1).transpose(1, 2)


def _rows_first(matrices: torch.Tensor) -> torch.Tensor:
    """Return ``matrices`` [tokens, rows, columns] as [rows, tokens * columns]."""
    return matrices.transpose(0, 1).reshape(matrices.shape[1], -1)


class LoKrHalf(AddingHalf):
    """The computing half of LoKr. Its linears have neither dropout nor another kernel."""

    linear = LoKrLinear

    def initial(self, name: str, leaf: str, shape: Shape, spec: AdapterSpec, cycle: int,
                weight: torch.Tensor | None) -> torch.Tensor:
        """Return the fp32 first value of ``name``: W1 is zero, the others are uniform as A in LoRA."""
        value = torch.zeros(shape)
        if leaf != LoKr.W1:
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator_of(name, spec, cycle))
        return value

    def product(
        self, values: Mapping[str, torch.Tensor], spec: AdapterSpec, weight: Shape, rows: slice
    ) -> torch.Tensor:
        """Return ``rows`` of s W1 x W2, in the dtype of ``values``. weight: the shape of the weight."""
        factors = [values[leaf] for leaf in (LoKr.W2, LoKr.W2_A, LoKr.W2_B) if leaf in values]
        return torch.kron(values[LoKr.W1], _w2(factors))[rows].mul_(spec.scaling)

    def in_peft(self, specs: Mapping[str, AdapterSpec], values: Mapping[str, torch.Tensor],
                dropout: float) -> tuple[PeftLoKrConfig, dict[str, torch.Tensor]]:
        """Return peft's config of the adapters, and their parameters by peft's names; see lora.py."""
        alphas = {path: spec.scaling * rank_of(spec) for path, spec in specs.items()}
        first = next(iter(specs))
        config = PeftLoKrConfig(
            target_modules=sorted(specs),
            r=rank_of(specs[first]),
            alpha=alphas[first],  # type: ignore[arg-type]  # any number works
            rank_pattern={path: rank_of(spec) for path, spec in specs.items()},
            alpha_pattern=alphas,
        )
        names = (f"{path}.{leaf}" for path in specs for leaf in LoKr.roles_of_leaves)
        return config, for_peft(values, (name for name in names if name in values))
