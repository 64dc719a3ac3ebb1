"""The endless stream of epochs: every sample once an epoch, whatever the batch and the number of ranks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prelora_ds.data.order import Position, Stream, epoch_order

SEEDS = st.integers(0, 2**63 - 1)


@given(seed=SEEDS, epoch=st.integers(0, 1000), samples=st.integers(1, 300))
def test_an_epoch_is_a_permutation(seed, epoch, samples):
    assert sorted(epoch_order(seed, epoch, samples)) == list(range(samples))


@given(seed=SEEDS, samples=st.integers(1, 40), size=st.integers(1, 50), steps=st.integers(1, 12))
@settings(deadline=None)
def test_batches_are_slices_of_the_stream_of_epochs(seed, samples, size, steps):
    rows = np.concatenate([Stream(samples, size).batch(seed, step) for step in range(steps)])
    epochs = -(-len(rows) // samples)
    stream = [(epoch, sample) for epoch in range(epochs) for sample in epoch_order(seed, epoch, samples).tolist()]
    assert list(map(tuple, rows.tolist())) == stream[:size * steps]
    for epoch in range(epochs - 1):
        assert sorted(rows[rows[:, 0] == epoch, 1]) == list(range(samples))


def test_a_batch_depends_only_on_its_step_and_not_on_those_asked_before():
    forward = [Stream(100, 32).batch(3, step) for step in range(10)]
    backward = [Stream(100, 32).batch(3, step) for step in reversed(range(10))]
    for one, other in zip(forward, reversed(backward), strict=True):
        assert one.shape == (32, 2) and one.dtype == np.int64
        np.testing.assert_array_equal(one, other)


def test_what_a_caller_does_to_a_batch_does_not_reach_the_next():
    first = Stream(10, 10).batch(0, 0)
    expected = first.copy()
    first[:] = -1
    np.testing.assert_array_equal(Stream(10, 10).batch(0, 0), expected)


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


@pytest.mark.parametrize(("step", "samples", "size", "tail"), [
    (0, 0, 4, "continue"), (0, 4, 0, "continue"), (-1, 4, 4, "continue"), (0, 3, 4, "drop")])
def test_impossible_batches_are_refused(step, samples, size, tail):
    with pytest.raises(ValueError, match=r"do not make a batch|no step"):
        Stream(samples, size, tail).batch(0, step)


@given(seed=SEEDS, samples=st.integers(1, 40), size=st.integers(1, 40), epochs=st.integers(1, 4))
@settings(deadline=None)
def test_a_dropped_tail_leaves_whole_batches_of_each_epoch_and_others_each_time(seed, samples, size, epochs):
    assume(size <= samples)
    stream, per_epoch = Stream(samples, size, "drop"), samples // size
    assert stream.samples_per_epoch == per_epoch * size
    for epoch in range(epochs):
        rows = np.concatenate([stream.batch(seed, epoch * per_epoch + i) for i in range(per_epoch)])
        assert (rows[:, 0] == epoch).all()
        assert rows[:, 1].tolist() == epoch_order(seed, epoch, samples)[:per_epoch * size].tolist()


@given(step=st.integers(0, 10**7), samples=st.integers(1, 2 * 10**6), size=st.integers(1, 5000),
       tail=st.sampled_from(["continue", "drop"]))
def test_epoch_and_offset_stand_for_a_step_and_back(step, samples, size, tail):
    assume(tail == "continue" or size <= samples)
    stream = Stream(samples, size, tail)
    epoch, offset = position = stream.position(step)
    assert 0 <= offset < stream.samples_per_epoch
    assert epoch * stream.samples_per_epoch + offset == step * size
    assert stream.step_at(position) == step


@pytest.mark.parametrize("position", [(0, 1), (1, 3), (-1, 0), (0, 100), (0, -4)])
def test_a_position_within_a_batch_or_out_of_its_epoch_is_refused(position):
    with pytest.raises(ValueError, match="not the start of a batch"):
        Stream(10, 4).step_at(Position(*position))

def test_a_later_epoch_of_a_large_set_costs_no_walk_through_the_earlier_ones():
    rows = Stream(1000, 4096).batch(0, 10**9)
    assert rows[0, 0] == 10**9 * 4096 // 1000
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(rows[:, 0].tolist()))
