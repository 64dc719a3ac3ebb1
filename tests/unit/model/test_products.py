"""BF16 products in fp32, in a process of their own, because they replace kernels of torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.pool import free_port

from prelora_ds.model.products import WIDE, over_tokens

# For each product: how to call it, in terms of BF16 tensors, so that it can be called with fp32 ones too.
PROGRAM = """
import torch
from torch.nn import functional as F

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=generator).bfloat16()


x, w, bias, b = draw(64, 96), draw(48, 96), draw(48), draw(96, 48)
images, kernel = draw(4, 3, 16, 16), draw(48, 3, 4, 4)
query, key, value = draw(2, 4, 20, 16), draw(2, 4, 20, 16), draw(2, 4, 20, 16)


def with_gradients(function):
    def call(*tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        result = function(*leaves)
        result.backward(torch.ones_like(result))
        return (result.detach(), *(leaf.grad for leaf in leaves))
    return call


CASES = {
    "mm": (lambda x, b: (x @ b,), (x, b)),
    "addmm": (lambda bias, x, b: (torch.addmm(bias, x, b, beta=0.5, alpha=2),), (bias, x, b)),
    "addmm_": (lambda y, x, b: (y.clone().addmm_(x, b, alpha=0.5),), (draw(64, 48), x, b)),
    "bmm": (lambda q, k: (torch.bmm(q[0], k[0].mT),), (query, key)),
    "linear": (with_gradients(F.linear), (x, w, bias)),
    "patches": (with_gradients(lambda i, k, b: F.conv2d(i, k, b, stride=4)), (images, kernel, bias)),
    "attention": (with_gradients(F.scaled_dot_product_attention), (query, key, value)),
}


def results(dtype):
    return {
        name: [r.bfloat16() for r in call(*(o.to(dtype) for o in operands))] for name, (call, operands) in CASES.items()
    }


def move(found, expected):
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


native, wide = results(torch.bfloat16), results(torch.float32)
from prelora_ds.model.products import multiply_in_fp32

assert multiply_in_fp32() is multiply_in_fp32()
found, wide_again = results(torch.bfloat16), results(torch.float32)
for name in CASES:
    for i, ours in enumerate(found[name]):
        assert ours.isfinite().all(), (name, i)
        assert torch.equal(ours, wide[name][i]) or name == "attention", (name, i, move(ours, wide[name][i]))
        assert move(ours, native[name][i]) < 2**-6, (name, i, move(ours, native[name][i]))
        assert torch.equal(wide[name][i], wide_again[name][i]), (name, i)
assert x.dtype is found["mm"][0].dtype is torch.bfloat16
x.requires_grad_()
assert (x @ b).dtype is torch.bfloat16 and (x.float() @ b.float()).dtype is torch.float32
"""


def test_they_are_fp32_products_rounded_once():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


ADAPTED = """
import torch
from prelora_ds.model.adapters.lora import _LoraProduct
from prelora_ds.model.products import multiply_in_fp32

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
multiply_in_fp32()
x, w, bias, a, b = (torch.randn(*shape, generator=generator).bfloat16()
                    for shape in ((2, 32, 96), (48, 96), (48,), (8, 96), (48, 8)))
grad = torch.randn(2, 32, 48, generator=generator).bfloat16()


def results(dtype, merged):
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w, bias, a, b)]
    y = _LoraProduct.apply(*leaves, 0.5, merged)
    y.backward(grad.to(dtype))
    return [t.bfloat16() for t in (y.detach(), *(leaf.grad for leaf in leaves))]


for merged in (False, True):
    for name, ours, exact in zip(("y", "x", "w", "bias", "a", "b"), results(torch.bfloat16, merged),
                                 results(torch.float32, merged), strict=True):
        if name in ("y", "b") and not merged:  # y is rounded before the sum, and x A^T is kept in BF16 for b
            assert (ours - exact).abs().max() < 2**-6 * exact.abs().max(), name
        else:
            assert torch.equal(ours, exact), (name, merged)
"""


def test_a_linear_with_an_adapter_rounds_its_gradients_once():
    ended = subprocess.run([sys.executable, "-c", ADAPTED], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("lacks", [True, False])
def test_a_rank_replaces_them_only_on_a_cpu_without_bf16(lacks):
    program = f"""
import torch
from prelora_ds.accelerator import choose_accelerator
from prelora_ds.engine import runtime
from prelora_ds.model import products

runtime.lacks_bf16_products = lambda: {lacks}
choose_accelerator()
runtime.init_process_group()
torch.distributed.destroy_process_group()
assert products.multiply_in_fp32.cache_info().currsize == {int(lacks)}
"""
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | group | {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(("m", "n"), [(8, WIDE), (WIDE, 8), (8, WIDE - 1), (WIDE - 1, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_over_tokens_is_rounded_once_and_in_one_piece_whichever_factor_is_narrow(m, n, dtype):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, size, generator=generator).to(dtype) for size in (m, n))
    exact = left.double().t() @ right.double()
    ours = over_tokens(left, right)
    assert ours.dtype is dtype and ours.is_contiguous()
    # Half a unit in the last place, and the rounding of the 64 fp32 sums.
    unit = torch.finfo(dtype).eps / 2 * exact.abs() + 64 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert ((ours.double() - exact).abs() <= unit).all()
