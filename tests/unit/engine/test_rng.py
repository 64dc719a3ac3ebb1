from __future__ import annotations

import pytest
import torch

from prelora_ds.engine.rng import seed_rng

TIME_STAMP = 20241125194444
LARGEST = 2**64 - 1  # the largest value of run.seed


def drawn(seed: int, rank: int, step: int = 0) -> tuple[float, ...]:
    seed_rng(seed, rank, step)
    return tuple(torch.rand(4).tolist())


@pytest.mark.parametrize("seed", [0, 1, TIME_STAMP, 2**63 - 1, 2**63, LARGEST - 1, LARGEST])
def test_with_any_valid_seed_each_rank_and_step_draws_differently(seed: int) -> None:
    steps, ranks = (0, 1, 2, 10_000_000), (0, 1, 2, 511)
    for step in steps:
        assert len({drawn(seed, rank, step) for rank in ranks}) == len(ranks)
    for rank in ranks:
        assert len({drawn(seed, rank, step) for step in steps}) == len(steps)
    assert drawn(seed, 1, 7) == drawn(seed, 1, 7)


def test_small_seeds_draw_what_they_drew_in_version_0_1_0() -> None:
    for step, seed in ((0, 3 + 1 + 1), (20, (3 + 1 + 1) * 1_000_003 + 20)):
        torch.manual_seed(seed)
        expected = tuple(torch.rand(4).tolist())
        assert drawn(3, 1, step) == expected
