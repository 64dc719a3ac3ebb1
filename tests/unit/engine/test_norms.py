"""The norm of an optimizer group at stage 0, with DeepSpeed's own as the oracle."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.utils import get_weight_norm

from prelora_ds.engine.norms import norm_of_group


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_norm_of_a_group_has_the_bits_of_deepspeeds(dtype):
    torch.manual_seed(0)
    gradients = [torch.randn(shape, dtype=dtype) * 10.0**i for i, shape in enumerate([(7, 5), (64,), (3, 4, 5), (1,)])]
    assert norm_of_group(gradients) == get_weight_norm(gradients) > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_norm_of_a_group_that_is_not_finite_is_as_deepspeed_marks_it(value):
    gradients = [torch.ones(3), torch.tensor([1.0, value])]
    assert norm_of_group(gradients) == get_weight_norm(gradients) == -1


def test_a_norm_whose_square_is_too_large_for_fp32_is_marked_as_not_finite():
    gradients = [torch.full((2,), 1e30)]
    assert norm_of_group(gradients) == get_weight_norm(gradients) == -1
