from __future__ import annotations

import math

import pytest

from prelora_ds.config.training import DivergenceConfig
from prelora_ds.core.divergence import DivergenceWatch

SPIKE = DivergenceConfig(spike=3.0, over=4)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_always_a_problem(loss: float) -> None:
    assert DivergenceWatch().problem(loss, DivergenceConfig()) == f"the loss is {loss}"


def test_a_spike_is_a_loss_above_so_many_times_the_mean_of_the_last_steps() -> None:
    watch = DivergenceWatch()
    for loss in (9.0, 1.0, 2.0, 3.0, 2.0):
        assert watch.problem(100.0, SPIKE) is None  # too few to judge by
        watch = watch.after_accepted(loss, SPIKE)
        if len(watch.losses) == 4 and loss == 3.0:
            break
    watch = watch.after_accepted(2.0, SPIKE)
    assert watch.losses == (1.0, 2.0, 3.0, 2.0)
    assert watch.problem(6.0, SPIKE) is None
    assert "is above 3 times 2, its mean over the last 4 steps" in str(watch.problem(6.1, SPIKE))
    assert watch.problem(1e9, DivergenceConfig()) is None


def test_what_was_left_out_is_counted_and_a_sound_step_ends_the_row() -> None:
    watch = DivergenceWatch().after_skipped().after_skipped()
    assert (watch.left_out, watch.in_a_row) == (2, 2)
    assert (watch.after_accepted(1.0, SPIKE).left_out, watch.after_accepted(1.0, SPIKE).in_a_row) == (2, 0)


def test_after_a_rollback_the_step_is_avoided_and_the_tries_are_counted() -> None:
    before = DivergenceWatch(rollbacks=1, avoided=frozenset({3}))
    watch = DivergenceWatch(losses=(1.0,)).rolled_back(9, before)
    assert (watch.rollbacks, watch.avoided, watch.losses) == (2, {3, 9}, (1.0,))
    assert not watch.accepts(9, 1.0, SPIKE) and watch.accepts(8, 1.0, SPIKE)
