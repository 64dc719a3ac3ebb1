"""LoRA, the half that computes: peft's layout and names, with a forward and backward pass of its own.

peft's own forward stores the input twice over, leaves the branch's output to autograd, and with fp32 adapters casts the
whole input. Here the branch is added into the output of the frozen linear, and backward computes and stores what
somebody asked for: no gradient of a frozen weight, and for an adapter that is inactive nothing at all.

y = x W^T + bias + s (x A^T) B^T, with x [..., in], W [out, in], A [rank, in], B [out, rank] (LoRA, Hu et al. 2021).

Kernels:

branch: the product above.
merged: one GEMM on bf16(W + s B A), merged once per optimizer step from an fp32 base (a merge into bf16(W) would round
    most of B A away); backward has skinny products only beside it. For a W that is frozen and whole on this rank.
peft: peft's own forward pass.

An A that does not train (LoRA-FA, Zhang et al. 2023) keeps x A^T for backward and not x.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.autograd.function import once_differentiable

from prelora_ds.core.adapters import AdapterSpec, Lora, Shape
from prelora_ds.model.families import ADAPTER_NAME


class LoraLinear(PeftLinear):
    """peft's ``lora.Linear`` of one adapter. With dropout, or merged or disabled through peft, it runs peft's code.

    active: whether the adapter trains now; an inactive one still adds its branch.
    base: the fp32 W while the weight holds W + s B A, else None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.active, self.fp32_weight = True, None

    fp32_weight: torch.Tensor | None

    @property
    def lora_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank]."""
        a: Any = self.lora_A[ADAPTER_NAME]
        b: Any = self.lora_B[ADAPTER_NAME]
        return a.weight, b.weight

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dropout = self.lora_dropout[ADAPTER_NAME]
        if self.fp32_weight is None and (self.disable_adapters or self.merged
                                  or (self.training and not isinstance(dropout, nn.Identity))):
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_weights
        if not self.active:
            a, b = a.detach(), b.detach()
        linear = self.get_base_layer()
        product: torch.Tensor = _LoraProduct.apply(x, linear.weight, linear.bias, a, b, self.scaling[ADAPTER_NAME],
                                                   self.fp32_weight is not None)
        return product

    def keep_fp32_weight(self) -> None:
        """Begin to train merged: from now on the weight is what `refresh_merged_weight` writes."""
        weight = self._base_weight()
        self.fp32_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)

    @torch.no_grad()
    def refresh_merged_weight(self) -> None:
        """Write bf16(W + s B A), summed in fp32, into the weight."""
        a, b = self.lora_weights
        assert self.fp32_weight is not None
        self._base_weight().data.copy_(
            torch.addmm(self.fp32_weight, b.float(), a.float(), alpha=self.scaling[ADAPTER_NAME]))

    def _base_weight(self) -> torch.Tensor:
        linear: Any = self.get_base_layer()
        weight: torch.Tensor = linear.weight
        return weight


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor,
                b: torch.Tensor, scaling: float, merged: bool) -> torch.Tensor:
        _, needs_w, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        y, h = nn.functional.linear(x, weight, bias), None
        if not merged:
            h = nn.functional.linear(x, a)
            y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b.t(), alpha=scaling)
        elif needs_b and not needs_a:
            # Merged, x A^T serves the gradient of B alone, and where x is kept for A it can wait for backward.
            h = nn.functional.linear(x, a)
        ctx.save_for_backward(x if needs_w or needs_a else None, h if needs_b else None, weight, a, b)
        ctx.scaling, ctx.merged = scaling, merged
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, weight, a, b = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
        s, g = ctx.scaling, grad.reshape(-1, grad.shape[-1])
        flat: Any = None if x is None else x.reshape(-1, x.shape[-1])  # forward keeps x for all that needs it
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


def refresh_merged_weights(module: nn.Module, *, inactive: bool = False) -> None:
    """Bring the weights of all linears that train merged up to their adapters; once per optimizer step.

    An inactive adapter stands still, so its linear is passed over but for ``inactive``, after base or adapters have
    been written from outside.
    """
    for linear in lora_linears(module):
        if linear.fp32_weight is not None and (linear.active or inactive):
            linear.refresh_merged_weight()


def peft_config(specs: Mapping[str, AdapterSpec], dropout: float) -> PeftLoraConfig:
    """The peft config of the adapters ``specs`` (path of a linear -> spec), as it stands in an adapter_config.json."""
    alphas = {path: spec.scaling * _rank(spec) for path, spec in specs.items()}
    some = next(iter(specs))
    return PeftLoraConfig(
        target_modules=sorted(specs),
        r=_rank(specs[some]),
        lora_alpha=alphas[some],  # type: ignore[arg-type]  # peft says int and takes any number
        rank_pattern={path: _rank(spec) for path, spec in specs.items()},
        alpha_pattern=alphas,
        lora_dropout=dropout,
    )


def attach(module: nn.Module, specs: Mapping[str, AdapterSpec], *, dropout: float, kernel: str) -> None:
    """Wrap the linears that ``specs`` names, in `LoraLinear` or, with kernel ``peft``, in peft's own class."""
    config = peft_config(specs, dropout)
    if kernel != "peft":
        config._register_custom_module({nn.Linear: LoraLinear})  # peft's door for a layer of one's own
    inject_adapter_in_model(config, module, adapter_name=ADAPTER_NAME)


def attached(module: nn.Module) -> dict[str, nn.Module]:
    """Path -> every linear of ``module`` that carries an adapter of this kind."""
    return {path: m for path, m in module.named_modules() if isinstance(m, PeftLinear)}


def check(path: str, linear: nn.Module, spec: AdapterSpec) -> None:
    """Compare the realised rank and scaling with the plan's. Raises RuntimeError that names the first difference.

    peft accepts a rank_pattern key that matches nothing without a word, and gives another scaling where an
    alpha_pattern is missing.
    """
    assert isinstance(linear, PeftLinear)
    weight: Any = linear.lora_A[ADAPTER_NAME].weight
    rank = getattr(weight, "ds_shape", weight.shape)[0]
    if (linear.r[ADAPTER_NAME], rank) != (spec.rank, spec.rank):
        raise RuntimeError(f"{path}: rank {rank} realised, {spec.rank} planned")
    scaling = linear.scaling[ADAPTER_NAME]
    if not math.isclose(scaling, spec.scaling, rel_tol=1e-12):
        raise RuntimeError(f"{path}: scaling {scaling} realised, {spec.scaling} planned")


def set_active(linear: nn.Module, active: bool) -> None:
    """Say whether the adapter of ``linear`` trains now. peft's own class needs no word: it merges nothing."""
    if isinstance(linear, LoraLinear):
        linear.active = active


def initial(name: str, leaf: str, shape: Shape, spec: AdapterSpec) -> torch.Tensor:
    """The first value of the parameter ``name``, fp32: A kaiming-uniform(sqrt 5), B zero (LoRA, section 4.1).

    It depends on the spec's seed and on ``name`` alone, so every rank at every world size draws the same.
    """
    value = torch.zeros(shape)
    if leaf == Lora.A:
        digest = hashlib.sha256(f"{spec.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value


def effective(weight: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec) -> torch.Tensor:
    """``W + s B A`` in fp32, whatever the inputs' dtype.

    Shapes: W [out, in]; ``values`` holds A [rank, in] and B [out, rank] by their leaves.
    """
    return torch.addmm(weight.float(), values[Lora.B].float(), values[Lora.A].float(), alpha=spec.scaling)


def _rank(spec: AdapterSpec) -> int:
    assert spec.rank is not None
    return spec.rank
