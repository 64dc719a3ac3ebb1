"""The endless stream of epochs: every sample once an epoch, whatever the batch and the number of ranks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelora_ds.data.order import epoch_order, global_batch

SEEDS = st.integers(0, 2**63 - 1)


@given(seed=SEEDS, epoch=st.integers(0, 1000), samples=st.integers(1, 300))
def test_an_epoch_is_a_permutation(seed, epoch, samples):
    assert sorted(epoch_order(seed, epoch, samples)) == list(range(samples))


@given(seed=SEEDS, samples=st.integers(1, 40), size=st.integers(1, 50), steps=st.integers(1, 12))
@settings(deadline=None)
def test_batches_are_slices_of_the_stream_of_epochs(seed, samples, size, steps):
    rows = np.concatenate([global_batch(seed, step, samples, size) for step in range(steps)])
    epochs = -(-len(rows) // samples)
    stream = [(epoch, sample) for epoch in range(epochs) for sample in epoch_order(seed, epoch, samples).tolist()]
    assert list(map(tuple, rows.tolist())) == stream[:size * steps]
    for epoch in range(epochs - 1):
        assert sorted(rows[rows[:, 0] == epoch, 1]) == list(range(samples))


def test_a_batch_depends_on_its_step_alone_and_not_on_those_asked_before():
    forward = [global_batch(3, step, 100, 32) for step in range(10)]
    backward = [global_batch(3, step, 100, 32) for step in reversed(range(10))]
    for one, other in zip(forward, reversed(backward), strict=True):
        assert one.shape == (32, 2) and one.dtype == np.int64
        np.testing.assert_array_equal(one, other)


def test_what_a_caller_does_to_a_batch_does_not_reach_the_next():
    first = global_batch(0, 0, 10, 10)
    expected = first.copy()
    first[:] = -1
    np.testing.assert_array_equal(global_batch(0, 0, 10, 10), expected)


def test_seeds_and_epochs_give_different_orders():
    orders = [tuple(epoch_order(seed, epoch, 200)) for seed in range(10) for epoch in range(10)]
    assert len(set(orders)) == 100


def test_the_first_place_is_uniform_over_the_samples():
    counts = np.bincount([epoch_order(0, epoch, 8)[0] for epoch in range(4000)], minlength=8)
    # chi-squared with 7 degrees of freedom; 24.3 is its 0.1 % point
    assert ((counts - 500) ** 2 / 500).sum() < 24.3


def test_the_order_is_the_one_of_earlier_runs():
    """Fixed values: a checkpoint resumed with this program must meet the order it left."""
    assert epoch_order(0, 0, 8).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert epoch_order(7, 2, 8).tolist() == [6, 4, 0, 5, 7, 1, 3, 2]


@pytest.mark.parametrize(("step", "samples", "size"), [(0, 0, 4), (0, 4, 0), (-1, 4, 4)])
def test_impossible_batches_are_refused(step, samples, size):
    with pytest.raises(ValueError, match="no batch"):
        global_batch(0, step, samples, size)


def test_a_later_epoch_of_a_large_set_costs_no_walk_through_the_earlier_ones():
    rows = global_batch(0, 10**9, 1000, 4096)
    assert rows[0, 0] == 10**9 * 4096 // 1000
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(rows[:, 0].tolist()))
