"""The computing half of AdaLoRA (Zhang et al. 2023), in a linear of our own.

y = x W^T + bias + s (E * x A^T) B^T, with A [rank, in], B [out, rank] and one singular value E per component.

Only E is ever pruned, by `prelora_ds.engine.pruning`. A pruned component still has A and B, and may come back while
pruning lasts.

The regulariser keeps the rows of A and the columns of B orthonormal. As in peft and in the authors' code it is the mean
over all A and B of the Frobenius norms of A A^T - I and B^T B - I. It is not computed as a loss: the backward pass adds
its gradient to those of A and B, because there ZeRO 3 holds whole factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from torch import nn
from torch.autograd.function import once_differentiable

from prelora_ds.core.adapters import AdaLora, AdapterSpec, Shape, rank_of
from prelora_ds.model.adapters.half import AddingHalf, Maker, for_peft
from prelora_ds.model.adapters.linear import OwnLinear, exact_type, generator_of
from prelora_ds.model.products import over_tokens

DEVIATION = 0.02  # of the first values of A and B, as in peft


class AdaLoraLinear(OwnLinear):
    """A linear with AdaLoRA.

    pull: the weight of the regulariser of one factor in an optimizer step.
    """

    def __init__(self, linear: nn.Linear, spec: AdapterSpec, pull: float) -> None:
        super().__init__(linear, spec)
        self.pull = pull

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, e = self.leaves(AdaLora.A, AdaLora.B, AdaLora.E)
        linear = self.base_layer
        output: torch.Tensor = _AdaLoraProduct.apply(x, linear.weight, linear.bias, a, b, e, self.spec.scaling,
                                                     self.pull / self.micro_batches)
        self.count_importance(output)
        return output


class _AdaLoraProduct(torch.autograd.Function):
    """The output of a linear with AdaLoRA, in the notation of the module's docstring. h is x A^T [tokens, rank]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        e: torch.Tensor,
        scaling: float,
        pull: float,
    ) -> torch.Tensor:
        _, needs_w, _, needs_a, needs_b, needs_e, *_ = ctx.needs_input_grad
        y = nn.functional.linear(x, weight, bias)
        h = x.reshape(-1, x.shape[-1]) @ a.t()
        y.view(-1, y.shape[-1]).addmm_(h * e.t(), b.t(), alpha=scaling)
        ctx.save_for_backward(x if needs_w or needs_a else None, h if needs_b or needs_e else None, weight, a, b, e)
        ctx.scaling = scaling
        ctx.pull = pull
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, weight, a, b, e = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_a, needs_b, needs_e, *_ = ctx.needs_input_grad
        s = ctx.scaling
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_w = grad_bias = grad_a = grad_b = grad_e = None

        if needs_x or needs_a or needs_e:
            into_h = g @ b  # the gradient of E * h, without the scaling
        if needs_x or needs_a:
            scaled = into_h * e.t()
        if needs_x:
            grad_x = (g @ weight).addmm_(scaled, a, alpha=s).view(*grad.shape[:-1], -1)
        if needs_w:
            grad_w = g.t() @ x.reshape(-1, x.shape[-1])
        if needs_bias:
            grad_bias = g.sum(0)
        if needs_a:
            grad_a = over_tokens(scaled, x.reshape(-1, x.shape[-1])).mul_(s)
            _add_pull(grad_a, a, ctx.pull)
        if needs_b:
            grad_b = over_tokens(g, h * e.t()).mul_(s)
            _add_pull(grad_b.t(), b.t(), ctx.pull)
        if needs_e:
            grad_e = (into_h * h).sum(0, dtype=exact_type(g.dtype)).mul_(s).to(e.dtype)[:, None]
        return grad_x, grad_w, grad_bias, grad_a, grad_b, grad_e, None, None


def _add_pull(grad: torch.Tensor, rows: torch.Tensor, pull: float) -> None:
    """Add to ``grad`` the gradient of ``pull`` times the Frobenius norm of R R^T - I. rows: R [rank, n]."""
    if not pull:
        return
    exact = rows.to(exact_type(rows.dtype))
    excess = exact @ exact.t()
    excess.diagonal().sub_(1)
    norm = torch.linalg.matrix_norm(excess).clamp_min(torch.finfo(excess.dtype).tiny)
    grad.add_((excess @ exact).mul_(2 * pull / norm))


class AdaLoraHalf(AddingHalf):
    """The computing half of AdaLoRA. Its linears have neither dropout nor another kernel."""

    linear = AdaLoraLinear

    def maker(self, module: nn.Module, specs: Mapping[str, AdapterSpec]) -> Maker:
        def pull_of(spec: AdapterSpec) -> float:
            weight = float(spec.options.get("orthogonality", AdaLora.options["orthogonality"]))
            return weight / (2 * len(specs))  # one A and one B per linear

        return lambda linear, spec: AdaLoraLinear(linear, spec, pull_of(spec))

    def initial(self, name: str, leaf: str, shape: Shape, spec: AdapterSpec, cycle: int,
                weight: torch.Tensor | None) -> torch.Tensor:
        """Return the fp32 first value of ``name``: E is zero, and A and B are normal with a deviation of 0.02."""
        if leaf == AdaLora.E:
            return torch.zeros(shape)
        return torch.randn(shape, generator=generator_of(name, spec, cycle)).mul_(DEVIATION)

    def product(
        self, values: Mapping[str, torch.Tensor], spec: AdapterSpec, weight: Shape, rows: slice
    ) -> torch.Tensor:
        """Return ``rows`` of s B (E * A), in the dtype of ``values``. weight: the shape of the weight."""
        return (values[AdaLora.B][rows] @ (values[AdaLora.E] * values[AdaLora.A])).mul_(spec.scaling)

    def in_peft(self, specs: Mapping[str, AdapterSpec], values: Mapping[str, torch.Tensor],
                dropout: float) -> tuple[PeftAdaLoraConfig, dict[str, torch.Tensor]]:
        """Return peft's config of the adapters, and their parameters by peft's names; see lora.py.

        peft divides its alpha by the rank + 1e-5 (peft 0.21, adalora/layer.py).
        """
        first = next(iter(specs.values()))
        config = PeftAdaLoraConfig(
            target_modules=sorted(specs),
            init_r=rank_of(first),
            lora_alpha=first.scaling * (rank_of(first) + 1e-5),  # type: ignore[arg-type]  # any number works
            total_step=1,  # required, but only training with peft uses it
        )
        return config, for_peft(values, (f"{path}.{leaf}" for path in specs for leaf in AdaLora.roles_of_leaves))
