from __future__ import annotations

from functools import cache

import pytest
import torch
from support.plans import prelora_plans

from prelora_ds.config.adapters import FAMILIES
from prelora_ds.config.model import ModelConfig
from prelora_ds.config.tree import ZeroSettings
from prelora_ds.core.layout import Layout
from prelora_ds.core.merge import Reset
from prelora_ds.cost.merging import MergeWork, merge_work
from prelora_ds.cost.timing import KINDS, Rates
from prelora_ds.model.families import find_layout
from prelora_ds.model.vit import build_model

VIT_L = ModelConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
ZERO = Reset()
ADAPTED = 24 * 12 * 1024**2  # elements of all adapted weights: four of d x d and two of d x 4d in each of 24 blocks
ADAPTERS = 442_368 * 256  # elements of A and B
RATES = Rates(dict.fromkeys(KINDS, 0.0) | {"gemm_tflop": 2.0, "wire_gb": 3.0}, "a test", True)


@cache
def layout_of_vit_l() -> Layout:
    with torch.device("meta"):
        return find_layout(build_model(VIT_L, 1000), FAMILIES)


def work(stage: int, reset: Reset = ZERO, kernel: str = "branch", world: int = 4, train_a: bool = True) -> MergeWork:
    lora = prelora_plans(layout_of_vit_l(), 256, train_a=train_a)[2]
    return merge_work(VIT_L, lora, layout_of_vit_l(), reset, ZeroSettings(stage), world, kernel=kernel)


def test_a_merge_at_rank_256_on_four_ranks() -> None:
    found = work(2, Reset("magnitude", 0.75))
    assert (found.flops, found.summed) == (2 * 256 * ADAPTED // 4, ADAPTED // 4)
    assert (found.drawn, found.chosen, found.shuffled) == (ADAPTERS, ADAPTERS, 0)
    assert found.all_reduce == 4 * (ADAPTED + 2 * ADAPTERS)
    # 123.1 GFLOP per image without adapters, and 256 x 442,368 x 2 per token; eight images are run.
    assert found.forward_flops / 8e9 == pytest.approx(123.1 + 197 * 2 * ADAPTERS / 1e9, rel=2e-3)


@pytest.mark.parametrize(("stage", "kernel", "reset", "sent"), [
    (0, "branch", Reset("magnitude", 0.5), ADAPTED),  # every rank holds the adapters
    (2, "branch", Reset("random", 0.5), ADAPTED + ADAPTERS),
    (2, "merged", ZERO, ADAPTERS),  # every rank adds to all of each weight
    (3, "branch", ZERO, ADAPTERS),  # a rank writes its partition
])
def test_what_is_gathered_for_a_merge(stage: int, kernel: str, reset: Reset, sent: int) -> None:
    assert work(stage, reset, kernel).all_reduce == 4 * sent


def test_the_kernel_merged_multiplies_on_every_rank() -> None:
    one, four = work(2, kernel="branch", world=1), work(2, kernel="merged")
    assert (four.flops, four.summed) == (one.flops, one.summed) == (2 * 256 * ADAPTED, ADAPTED)


def test_a_frozen_a_is_drawn_again_but_has_no_moments() -> None:
    found = work(2, Reset("random", 0.5), train_a=False)
    in_b = 256 * 24 * (4 * 1024 + 4096 + 1024)
    assert (found.drawn, found.chosen, found.shuffled) == (ADAPTERS, 0, in_b)


def test_the_seconds_of_a_merge() -> None:
    """30 GFLOP/s; 2.7, 3.7, 20 and 10 ns per element; 2 s per TFLOP; 3 s per GB, of which 1.5 are sent per GB."""
    one = MergeWork(30 * 10**9, 10**9, 10**9, 10**9, 10**9, 10**12, 10**9)
    assert one.seconds(RATES, 4) == pytest.approx(1 + 2.7 + 3.7 + 20 + 10 + 2 + 1.5 * 3)
    assert MergeWork(0, 0, 0, 0, 0, 0, 10**9).seconds(RATES, 1) == 0
