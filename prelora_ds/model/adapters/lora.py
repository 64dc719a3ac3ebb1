"""The computing half of LoRA: peft's layout and names, with its own forward and backward pass.

peft's own forward stores the input twice, leaves the branch's output to autograd, and with fp32
adapters casts the whole input. Here the branch is accumulated into the output of the frozen linear,
and backward computes and stores only what is needed: no gradient of a frozen weight, and nothing at
all for an inactive adapter.

y = x W^T + bias + s (x A^T) B^T, with x [..., in], W [out, in], A [rank, in] and B [out, rank]
(LoRA, Hu et al. 2021).

Kernels:

branch: the products above.
merged: one GEMM with bf16(W + s B A), which is merged once per optimizer step from the fp32 W;
    merging into bf16(W) would round most of B A away. Backward adds only skinny products, with one
    side no longer than the rank. It requires a frozen W that this rank holds in full.
peft: peft's own forward pass.

Of a quantised W, each product of `branch` makes the BF16 value and drops it; backward keeps the codes.

If A does not train (LoRA-FA, Zhang et al. 2023), x A^T is kept for backward instead of x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.autograd.function import once_differentiable

from prelora_ds.core.adapters import AdapterSpec, Lora, Shape, rank_of
from prelora_ds.model.adapters.half import for_peft
from prelora_ds.model.adapters.linear import AdaptedLinear, generator_of
from prelora_ds.model.families import ADAPTER_NAME
from prelora_ds.model.products import over_tokens, widened
from prelora_ds.model.quantised import QUANTISERS, Quantised


class LoraLinear(AdaptedLinear, PeftLinear):
    """peft's ``lora.Linear`` with one adapter and a faster forward and backward pass.

    It runs peft's code while dropout is active in training, and when peft has merged or disabled
    the adapter.

    fp32_weight: the fp32 W while the linear's weight holds W + s B A, otherwise None.
    base_dtype: the type of a quantised W; the linear then has no parameter for it.
    quantised: the quantised W, once it is written.
    """

    fp32_weight: torch.Tensor | None = None
    base_dtype: str | None = None
    quantised: Quantised | None = None

    @property
    def lora_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank], the weights of the adapter."""
        a: Any = self.lora_A[ADAPTER_NAME]
        b: Any = self.lora_B[ADAPTER_NAME]
        return a.weight, b.weight

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dropout = self.lora_dropout[ADAPTER_NAME]
        drops_out = self.training and not isinstance(dropout, nn.Identity)
        if self.fp32_weight is None and (self.disable_adapters or self.merged or drops_out):
            return super().forward(x, *args, **kwargs)

        a, b = self.lora_weights
        if not self.active:
            a, b = a.detach(), b.detach()
        linear = self.get_base_layer()
        merged = self.fp32_weight is not None
        weight = linear.weight if self.base_dtype is None else self.quantised
        output: torch.Tensor = _LoraProduct.apply(
            x, weight, linear.bias, a, b, self.scaling[ADAPTER_NAME], merged
        )
        self.count_importance(output)
        return output

    def refresh(self, *, inactive: bool = False) -> None:
        """Merge the adapter again if the kernel is the merged one."""
        if self.fp32_weight is not None and (self.active or inactive):
            self.refresh_merged_weight()

    def besides_leaves(self) -> list[torch.Tensor]:
        quantised = [] if self.quantised is None else self.quantised.parts()
        return quantised if self.fp32_weight is None else [self.fp32_weight]

    def drop_weight(self, dtype: str) -> None:
        """Remove the parameter W, of which the linear will hold a quantised value in its place.

        The caller then calls `write_quantised`.
        """
        self.base_dtype = dtype
        del self.get_base_layer().weight

    def write_quantised(self, weight: torch.Tensor) -> None:
        """Quantise the fp32 W [out, in]."""
        assert self.base_dtype is not None
        self.quantised = QUANTISERS[self.base_dtype](weight)

    def dense_weight(self) -> torch.Tensor:
        """Return the BF16 value of a quantised W."""
        assert self.quantised is not None, "W is written when the engine is built"
        return self.quantised.dense(torch.bfloat16)

    def keep_fp32_weight(self) -> None:
        """Switch to the merged kernel: `fp32_weight` holds W, and the weight W + s B A.

        The caller then writes W into `fp32_weight` and calls `refresh_merged_weight`.
        """
        weight = self._base_weight()
        self.fp32_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)

    @torch.no_grad()
    def refresh_merged_weight(self) -> None:
        """Write bf16(W + s B A), summed in fp32, into the weight."""
        a, b = self.lora_weights
        assert self.fp32_weight is not None
        scaling = self.scaling[ADAPTER_NAME]
        merged = torch.addmm(self.fp32_weight, b.float(), a.float(), alpha=scaling)
        self._base_weight().data.copy_(merged)

    def _base_weight(self) -> torch.Tensor:
        linear: Any = self.get_base_layer()
        weight: torch.Tensor = linear.weight
        return weight


class _LoraProduct(torch.autograd.Function):
    """The output of a linear with its adapter, in the notation of the module's docstring.

    h is x A^T. If ``merged``, ``weight`` is W + s B A already. A quantised ``weight`` has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | Quantised,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        merged: bool,
    ) -> torch.Tensor:
        _, needs_w, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        quantised = None if isinstance(weight, torch.Tensor) else weight
        dense = weight if isinstance(weight, torch.Tensor) else weight.dense(x.dtype)
        y = nn.functional.linear(x, dense, bias)
        h = None
        if not merged:
            h = nn.functional.linear(x, a)
            y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b.t(), alpha=scaling)
        elif needs_b and not needs_a:
            # In the merged kernel only the gradient of B needs x A^T. If x is kept for A anyway,
            # backward computes it.
            h = nn.functional.linear(x, a)

        saved_x = x if needs_w or needs_a else None
        saved_h = h if needs_b else None
        ctx.save_for_backward(saved_x, saved_h, dense if quantised is None else None, a, b)
        ctx.quantised = quantised
        ctx.scaling = scaling
        ctx.merged = merged
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, weight, a, b = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
        s = ctx.scaling
        flat = grad.reshape(-1, grad.shape[-1])
        flat_x: Any = None if x is None else x.reshape(-1, x.shape[-1])  # kept whenever it is used
        g, flat_x, h, a, b = widened(flat, flat_x, h, a, b)
        grad_x = grad_w = grad_bias = grad_a = grad_b = None

        if needs_a or (needs_x and not ctx.merged):
            gb = g @ b  # [tokens, rank]
        if needs_x:
            (weight,) = widened(weight if ctx.quantised is None else ctx.quantised.dense(grad.dtype))
            grad_x = g @ weight
            if not ctx.merged:
                grad_x.addmm_(gb, a, alpha=s)
            grad_x = grad_x.to(grad.dtype).view(*grad.shape[:-1], -1)
        if needs_w:
            grad_w = (g.t() @ flat_x).to(grad.dtype)
        if needs_bias:
            grad_bias = flat.sum(0)
        if needs_a:
            grad_a = over_tokens(gb, flat_x).mul_(s).to(grad.dtype)
        if needs_b:
            h = flat_x @ a.t() if h is None else h.view(-1, h.shape[-1])
            grad_b = over_tokens(g, h).mul_(s).to(grad.dtype)
        return grad_x, grad_w, grad_bias, grad_a, grad_b, None, None


def lora_linears(module: nn.Module) -> Iterator[LoraLinear]:
    """Return the linears of ``module`` that have our LoRA kernels."""
    return (m for m in module.modules() if isinstance(m, LoraLinear))


def peft_config(specs: Mapping[str, AdapterSpec], dropout: float) -> PeftLoraConfig:
    """Return the config of ``specs`` (path of a linear -> spec) for peft's adapter_config.json."""
    alphas = {path: spec.scaling * rank_of(spec) for path, spec in specs.items()}
    first = next(iter(specs))
    return PeftLoraConfig(
        target_modules=sorted(specs),
        r=rank_of(specs[first]),
        lora_alpha=alphas[first],  # type: ignore[arg-type]  # any number works
        rank_pattern={path: rank_of(spec) for path, spec in specs.items()},
        alpha_pattern=alphas,
        lora_dropout=dropout,
    )


def attach(
    module: nn.Module, specs: Mapping[str, AdapterSpec], *, dropout: float, kernel: str
) -> None:
    """Wrap the linears of ``specs`` in `LoraLinear`, or with kernel ``peft`` in peft's class."""
    config = peft_config(specs, dropout)
    if kernel != "peft":
        config._register_custom_module({nn.Linear: LoraLinear})  # peft's hook for custom layers
    inject_adapter_in_model(config, module, adapter_name=ADAPTER_NAME)


def attached(module: nn.Module) -> dict[str, nn.Module]:
    """Return path -> linear, for all linears of ``module`` with an adapter of this kind."""
    return {path: m for path, m in module.named_modules() if isinstance(m, PeftLinear)}


def check(path: str, linear: nn.Module, spec: AdapterSpec) -> None:
    """Compare the rank and scaling of ``linear`` with the plan's.

    peft silently accepts a rank_pattern key that matches nothing, and uses another scaling if an
    alpha_pattern is missing. Raises RuntimeError, which names the first difference.
    """
    assert isinstance(linear, PeftLinear)
    weight: Any = linear.lora_A[ADAPTER_NAME].weight
    rank = getattr(weight, "ds_shape", weight.shape)[0]
    if (linear.r[ADAPTER_NAME], rank) != (spec.rank, spec.rank):
        raise RuntimeError(f"{path}: rank {rank} realised, {spec.rank} planned")
    scaling = linear.scaling[ADAPTER_NAME]
    if not math.isclose(scaling, spec.scaling, rel_tol=1e-12):
        raise RuntimeError(f"{path}: scaling {scaling} realised, {spec.scaling} planned")


def initial(name: str, leaf: str, shape: Shape, spec: AdapterSpec, cycle: int = 0,
            weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return the fp32 initial value of ``name``: B is zero, and A as the option ``init`` says.

    With ``update`` it is that of ``kaiming``, for what `prelora_ds.engine.from_update` has not set.

    Source: LoRA, section 4.1; the two distributions of A are those of peft. The value depends only
    on the spec, on ``cycle`` (`Plan.cycle`) and on ``name``, so it is the same on every rank and for
    every world size. ``weight`` is not needed.
    """
    value = torch.zeros(shape)
    if leaf == Lora.A:
        generator = generator_of(name, spec, cycle)
        if spec.options.get("init", Lora.options["init"]) == "gaussian":
            nn.init.normal_(value, std=1 / rank_of(spec), generator=generator)
        else:
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value


def product(
    values: Mapping[str, torch.Tensor], spec: AdapterSpec, weight: Shape, rows: slice
) -> torch.Tensor:
    """Return ``rows`` of s B A, in the dtype of ``values`` (A [rank, in] and B [out, rank]).

    weight: the shape of the weight.
    """
    return (values[Lora.B][rows] @ values[Lora.A]).mul_(spec.scaling)


def shrunk(values: Mapping[str, torch.Tensor], spec: AdapterSpec) -> dict[str, torch.Tensor]:
    """Return A and B of ``spec.rank`` whose product is nearest to that of ``values``.

    values: A [larger rank, in] and B [out, larger rank].

    It is the truncated singular value decomposition of B A (Eckart and Young 1936), computed from
    decompositions of the two thin factors. A and B get the square root of the singular values each.
    """
    b, b_part = torch.linalg.qr(values[Lora.B])
    a, a_part = torch.linalg.qr(values[Lora.A].t())
    left, singular, right = torch.linalg.svd(b_part @ a_part.t(), full_matrices=False)
    kept = slice(rank_of(spec))
    root = singular[kept].sqrt()
    return {Lora.A: (a @ right[kept].t() * root).t(), Lora.B: b @ left[:, kept] * root}


def effective(
    weight: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec
) -> torch.Tensor:
    """Return W + s B A in fp32, for inputs of any dtype.

    weight: W [out, in].
    values: A [rank, in] and B [out, rank] by leaf.
    """
    return torch.addmm(
        weight.float(), values[Lora.B].float(), values[Lora.A].float(), alpha=spec.scaling
    )


def in_peft(specs: Mapping[str, AdapterSpec], values: Mapping[str, torch.Tensor],
            dropout: float) -> tuple[PeftLoraConfig, dict[str, torch.Tensor]]:
    """Return peft's config of the adapters ``specs``, and their parameters by peft's names.

    values: the fp32 parameters of the model and of its adapters.
    """
    names = (f"{path}.{leaf}" for path in specs for leaf in (Lora.A, Lora.B))
    return peft_config(specs, dropout), for_peft(values, names)
