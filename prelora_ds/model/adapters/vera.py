"""The computing half of VeRA (Kopiczko et al. 2024), in a linear of our own.

y = x W^T + bias + k b * ((d * (x A^T)) B^T), with A [rank, in], B [out, rank], b [out], d [rank] and k a number.

All linears share A and B: those of a linear are the first columns of A and the first rows of B. They are neither
parameters nor buffers. They are drawn again from the seed whenever an engine is built, so no state and no checkpoint
contains them. Their elements are uniform in [-1, 1], rounded to BF16. k brings them to the bounds of Kaiming's
initialisation for this linear, sqrt(6 / in) and sqrt(6 / rank), and contains the adapter's scaling.

The backward pass needs no x, only x A^T, because A does not train.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import VeraConfig as PeftVeraConfig
from torch import nn
from torch.autograd.function import once_differentiable

from prelora_ds.core.adapters import AdapterSpec, Shape, Vera, rank_of
from prelora_ds.model.adapters.half import PEFT_PREFIX, AddingHalf, Maker
from prelora_ds.model.adapters.linear import OwnLinear, exact_type
from prelora_ds.model.products import over_tokens, widened


class SharedPair:
    """A and B for all linears of a module, drawn when they are first needed.

    inputs, outputs: the largest number of features of any of the linears.
    """

    def __init__(self, seed: int, rank: int, inputs: int, outputs: int) -> None:
        self._drawn_from = (seed, rank, inputs, outputs)
        self._pair: tuple[torch.Tensor, torch.Tensor] | None = None

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A^T [inputs, rank] and B [outputs, rank] on ``device``, in BF16."""
        if self._pair is None or self._pair[0].device != device:
            a, b = drawn_pair(*self._drawn_from)
            self._pair = a.to(device), b.to(device)
        return self._pair


def drawn_pair(seed: int, rank: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A^T [inputs, rank] and B [outputs, rank] in BF16, on the CPU.

    The first rows do not depend on how many there are.
    """

    def draw(name: str, rows: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{seed}/vera/{name}/{rank}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return (torch.rand(rows, rank, generator=generator) * 2 - 1).bfloat16()

    return draw("A", inputs), draw("B", outputs)


def _factor(spec: AdapterSpec, inputs: int) -> float:
    """Return k."""
    return spec.scaling * math.sqrt(6 / inputs) * math.sqrt(6 / rank_of(spec))


class VeraLinear(OwnLinear):
    """A linear with VeRA."""

    def __init__(self, linear: nn.Linear, spec: AdapterSpec, pair: SharedPair) -> None:
        super().__init__(linear, spec)
        self.pair = pair

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, d = self.leaves(Vera.B, Vera.D)
        linear = self.base_layer
        shared_a, shared_b = self.pair.on(x.device)
        rows_a, rows_b = shared_a[: linear.in_features].to(x.dtype), shared_b[: linear.out_features].to(x.dtype)
        output: torch.Tensor = _VeraProduct.apply(x, linear.weight, linear.bias, b, d, rows_a, rows_b,
                                                  _factor(self.spec, linear.in_features))
        self.count_importance(output)
        return output

    def refresh(self, *, inactive: bool = False) -> None:
        """Draw the pair, if that has not been done on this device."""
        self.pair.on(self.base_layer.weight.device)

    def besides_leaves(self) -> list[torch.Tensor]:
        return list(self.pair.on(self.base_layer.weight.device))


class _VeraProduct(torch.autograd.Function):
    """The output of a linear with VeRA, in the notation of the module's docstring.

    shared_a is A^T, shared_b is B, and h is x A^T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        b: torch.Tensor,
        d: torch.Tensor,
        shared_a: torch.Tensor,
        shared_b: torch.Tensor,
        factor: float,
    ) -> torch.Tensor:
        _, needs_w, _, needs_b, needs_d, *_ = ctx.needs_input_grad
        y = nn.functional.linear(x, weight, bias)
        h = x.reshape(-1, x.shape[-1]) @ shared_a
        y.view(-1, y.shape[-1]).addmm_(h * d, (shared_b * b[:, None]).t(), alpha=factor)
        ctx.save_for_backward(x if needs_w else None, h if needs_b or needs_d else None, weight, b, d, shared_a,
                              shared_b)
        ctx.factor = factor
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, weight, b, d, shared_a, shared_b = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_b, needs_d, *_ = ctx.needs_input_grad
        k = ctx.factor
        flat = grad.reshape(-1, grad.shape[-1])
        g, h, wide_a, scaled_b = widened(flat, h, shared_a, shared_b * b[:, None])
        exact = exact_type(g.dtype)
        grad_x = grad_w = grad_bias = grad_b = grad_d = None

        if needs_x or needs_d:
            into_d = g @ scaled_b  # [tokens, rank]
        if needs_x:
            (wide_w,) = widened(weight)
            grad_x = (g @ wide_w).addmm_(into_d * d, wide_a.t(), alpha=k).to(grad.dtype).view(*grad.shape[:-1], -1)
        if needs_w:
            grad_w = flat.t() @ x.reshape(-1, x.shape[-1])
        if needs_bias:
            grad_bias = flat.sum(0)
        if needs_b:
            grad_b = (over_tokens(g, h * d) * shared_b).sum(1, dtype=exact).mul_(k).to(b.dtype)
        if needs_d:
            grad_d = (into_d * h).sum(0, dtype=exact).mul_(k).to(d.dtype)
        return grad_x, grad_w, grad_bias, grad_b, grad_d, None, None, None


def _largest(module: nn.Module, specs: Mapping[str, AdapterSpec]) -> tuple[int, int]:
    """Return the largest number of inputs and of outputs of the linears that ``specs`` names."""
    linears: Any = [module.get_submodule(path) for path in specs]
    return max(linear.in_features for linear in linears), max(linear.out_features for linear in linears)


class VeraHalf(AddingHalf):
    """The computing half of VeRA. Its linears have neither dropout nor another kernel."""

    linear = VeraLinear

    def maker(self, module: nn.Module, specs: Mapping[str, AdapterSpec]) -> Maker:
        pairs = {(spec.seed, rank_of(spec)): SharedPair(spec.seed, rank_of(spec), *_largest(module, specs))
                 for spec in specs.values()}
        return lambda linear, spec: VeraLinear(linear, spec, pairs[spec.seed, rank_of(spec)])

    def initial(self, name: str, leaf: str, shape: Shape, spec: AdapterSpec, cycle: int,
                weight: torch.Tensor | None) -> torch.Tensor:
        """Return the fp32 first value of ``name``: b zero, and each element of d the option ``d_initial``."""
        if leaf == Vera.B:
            return torch.zeros(shape)
        return torch.full(shape, float(spec.options.get("d_initial", Vera.options["d_initial"])))

    def product(
        self, values: Mapping[str, torch.Tensor], spec: AdapterSpec, weight: Shape, rows: slice
    ) -> torch.Tensor:
        """Return ``rows`` of k b * (B (d * A)), in the dtype of ``values``. weight: the shape of the weight."""
        outputs, inputs = weight
        b, d = values[Vera.B], values[Vera.D]
        shared_a, shared_b = (t.to(b) for t in drawn_pair(spec.seed, rank_of(spec), inputs, outputs))
        return ((shared_b * b[:, None])[rows] @ (shared_a * d).t()).mul_(_factor(spec, inputs))

    def in_peft(self, specs: Mapping[str, AdapterSpec], values: Mapping[str, torch.Tensor],
                dropout: float) -> tuple[PeftVeraConfig, dict[str, torch.Tensor]]:
        """Return peft's config of the adapters, and their parameters by peft's names; see lora.py.

        peft has no factor k, so b contains it. The pair is stored too, because peft would draw another one.
        """
        first = next(iter(specs.values()))
        shapes = {path: values[f"{path}.weight"].shape for path in specs}
        outputs, inputs = (max(shape[axis] for shape in shapes.values()) for axis in (0, 1))
        shared_a, shared_b = drawn_pair(first.seed, rank_of(first), inputs, outputs)
        config = PeftVeraConfig(r=rank_of(first), target_modules=sorted(specs), save_projection=True)
        adapters = {"base_model.vera_A": shared_a.t().float().contiguous(), "base_model.vera_B": shared_b.float()}
        for path, spec in specs.items():
            adapters[f"{PEFT_PREFIX}{path}.{Vera.B}"] = values[f"{path}.{Vera.B}"] * _factor(spec, shapes[path][1])
            adapters[f"{PEFT_PREFIX}{path}.{Vera.D}"] = values[f"{path}.{Vera.D}"]
        return config, adapters
