"""Fast products of BF16 tensors on a CPU that has no instructions for them.

On such a CPU (AVX2 only, for example) oneDNN refuses BF16, and torch 2.14 falls back to plain loops: 0.5 to 10 GFLOP/s
per core, where fp32 reaches 70. `multiply_in_fp32` replaces the kernels of these operators. The replacements widen
their BF16 operands, multiply in fp32, and round the result to BF16 once. BF16 instructions round like that too: they
add up in fp32. What is stored, communicated and saved stays BF16.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

# The operators that a ViT multiplies with, and for each whether all its results are BF16 where its operands are.
OPERATORS = {
    "mm": True,
    "addmm": True,
    "bmm": True,
    "_slow_conv2d_forward": True,
    "_slow_conv2d_backward.output_mask": True,
    "_scaled_dot_product_flash_attention_for_cpu": False,  # the second result, the log of sums, is fp32
    "_scaled_dot_product_flash_attention_for_cpu_backward": True,
}

# From this width on, `over_tokens` copies the narrow factor. Copies cost more than they save for narrower outputs.
WIDE = 1024

_in_fp32 = False  # whether this process multiplies BF16 in fp32


def lacks_bf16_products() -> bool:
    """Whether torch multiplies BF16 on this CPU without oneDNN."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def multiply_in_fp32() -> torch.library.Library:
    """Replace the CPU kernels of `OPERATORS` in this process; operands that are not BF16 reach the original kernels.

    The returned library keeps the replacements alive. They take about 4 microseconds per call.
    """
    library = torch.library.Library("aten", "IMPL")
    for operator, narrow_all in OPERATORS.items():
        kernel = torch.library.get_kernel(f"aten::{operator}", "CPU")
        library.impl(
            operator,
            functools.partial(_multiply, kernel, narrow_all),
            "CPU",
            with_keyset=True,
            allow_override=True,
        )
    global _in_fp32
    _in_fp32 = True
    in_place = torch.library.get_kernel("aten::addmm_", "CPU")
    library.impl(
        "addmm_", functools.partial(_multiply_in_place, in_place), "CPU", with_keyset=True, allow_override=True
    )
    return library


def widened(*tensors: Any) -> tuple[Any, ...]:
    """Return BF16 tensors in fp32 if products of BF16 are computed in fp32 here, and otherwise all as they are.

    Code with several products of a tensor converts it only once with this, and rounds only what it returns. The
    linears with adapters do so in their backward passes. In the forward pass the output of a new adapter has to keep
    the bits of the linear, which DeepSpeed's linear of ZeRO stage 3 rounds before it adds the bias.
    """
    return tuple(map(_widen, tensors)) if _in_fp32 else tensors


def over_tokens(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left^T right, for ``left`` [tokens, m] and ``right`` [tokens, n] of which one is narrow.

    On a CPU (torch 2.14) the narrow factor is copied so that its rows are in one piece, and comes first. In BF16 at a
    width of 4,096 and ranks of 8 to 64, oneDNN is then up to twice as fast.
    """
    narrow, wide = (left, right) if left.shape[1] <= right.shape[1] else (right, left)
    if left.device.type != "cpu" or wide.shape[1] < WIDE:
        return left.t() @ right
    product = narrow.t().contiguous() @ wide
    return product if narrow is left else product.t().contiguous()


def _multiply(kernel: Any, narrow_all: bool, keys: Any, *args: Any, **kwargs: Any) -> Any:
    if args[0].dtype is not torch.bfloat16:
        return kernel.call_boxed(keys, *args, **kwargs)
    results = kernel.call_boxed(keys, *map(_widen, args), **kwargs)
    if isinstance(results, torch.Tensor):
        return results.bfloat16()
    return tuple(_narrow(r) if narrow_all or i == 0 else r for i, r in enumerate(results))


def _multiply_in_place(kernel: Any, keys: Any, target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if target.dtype is not torch.bfloat16:
        result: torch.Tensor = kernel.call_boxed(keys, target, *args, **kwargs)
        return result
    return target.copy_(kernel.call_boxed(keys, target.float(), *map(_widen, args), **kwargs))


def _widen(value: Any) -> Any:
    is_bf16 = isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16
    return value.float() if is_bf16 else value


def _narrow(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, torch.Tensor) else value
