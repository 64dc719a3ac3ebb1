from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.config.training import OptimizerConfig
from prelora_ds.core.duration import Duration
from prelora_ds.core.schedule import Restart, Timeline, lr_at, rate_factor

SIZES = st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(1, 12))  # samples, global batch, epochs


def timeline(samples: int = 100, batch: int = 16, duration: str = "10 epochs") -> Timeline:
    return Timeline(samples, batch, Duration(duration))


def ends_by_counting(samples: int, batch: int, epochs: int) -> list[int]:
    """The step in whose batch the last sample of each epoch lies, sample by sample."""
    ends, seen, step = [], 0, 0
    while len(ends) < epochs:
        step += 1
        for _ in range(batch):
            seen += 1
            if seen % samples == 0 and len(ends) < epochs:
                ends.append(step)
    return ends


# ---- epochs

def test_epoch_ends_of_a_batch_that_does_not_divide() -> None:
    t = timeline(100, 16)
    assert [t.step_after(0, Duration(f"{e} epochs")) for e in (1, 2, 3, 4)] == [7, 13, 19, 25]
    assert t.total_steps == 63


@given(SIZES)
def test_epoch_e_ends_where_its_last_sample_is_trained_on(sizes: tuple[int, int, int]) -> None:
    samples, batch, epochs = sizes
    t = timeline(samples, batch, f"{epochs} epochs")
    ends = ends_by_counting(samples, batch, epochs)
    assert [t.step_after(0, Duration(f"{e + 1} epochs")) for e in range(epochs)] == ends
    assert t.total_steps == ends[-1]
    assert t.ticks(Duration("1 epoch")) == set(ends)


@given(SIZES, st.integers(0, 300))
def test_epochs_done_counts_whole_epochs(sizes: tuple[int, int, int], step: int) -> None:
    samples, batch, _ = sizes
    t = timeline(samples, batch)
    trained = step * batch
    assert t.epochs_done(step) == len([e for e in range(1, trained + 1) if e * samples <= trained])
    assert t.epoch_at(step) == pytest.approx(trained / samples)
    assert t.epochs_done(step) <= t.epoch_at(step) + 1e-9


@given(SIZES, st.integers(1, 5))
def test_a_duration_of_epochs_begun_at_an_epoch_end_lasts_that_many_epochs(
    sizes: tuple[int, int, int], lasting: int
) -> None:
    samples, batch, epochs = sizes
    ends = ends_by_counting(samples, batch, 400)
    start = ends[epochs - 1]
    # Where a batch holds more than an epoch, several epochs end at one step, and the last of them counts.
    done = max(e for e, end in enumerate(ends, 1) if end == start and e * samples <= start * batch)
    assert timeline(samples, batch).step_after(start, Duration(f"{lasting} epochs")) == ends[done + lasting - 1]


def test_step_after_counts_steps_and_shares_from_the_start() -> None:
    t = timeline(100, 16, "200 steps")
    assert t.step_after(37, Duration("5 steps")) == 42
    assert t.step_after(37, Duration("5 %")) == 47
    assert t.step_after(37, Duration("0.1 %")) == 38
    assert t.step_after(0, Duration("0 steps")) == 0


def test_step_after_in_the_middle_of_an_epoch_counts_from_its_beginning() -> None:
    t = timeline(100, 10, "10 epochs")
    assert t.step_after(35, Duration("1 epoch")) == 40
    assert t.step_after(40, Duration("1 epoch")) == 50
    assert t.step_after(40, Duration("0.25 epochs")) == 43


def test_a_run_cannot_last_a_share_of_itself() -> None:
    with pytest.raises(ValueError, match="given in steps or epochs"):
        _ = timeline(duration="50 %").total_steps


# ---- ticks

@pytest.mark.parametrize(("every", "expected"), [
    ("10 steps", {10, 20, 30, 33}), ("11 steps", {11, 22, 33}), ("50 steps", {33}), ("25 %", {9, 18, 27, 33}),
    ("1 epoch", {7, 13, 19, 25, 32, 33}), ("0.5 epochs", {4, 7, 10, 13, 16, 19, 22, 25, 29, 32, 33}),
    ("100 %", {33}), ("0 steps", set(range(1, 34))), ("0 epochs", set(range(1, 34))), ("0 %", set(range(1, 34))),
])
def test_ticks(every: str, expected: set[int]) -> None:
    assert timeline(100, 16, "33 steps").ticks(Duration(every)) == expected


@given(SIZES, st.sampled_from(["1 step", "3 steps", "7 %", "33.3 %", "1 epoch", "2 epochs", "0.3 epochs",
                               "1.7 epochs"]))
def test_ticks_lie_in_the_run_contain_its_last_step_and_none_is_left_out(
    sizes: tuple[int, int, int], every: str
) -> None:
    samples, batch, epochs = sizes
    t, duration = timeline(samples, batch, f"{epochs} epochs"), Duration(every)
    ticks = sorted(t.ticks(duration))
    assert ticks[-1] == t.total_steps
    assert ticks[0] >= 1
    if duration.unit == "epoch":
        due = {math.ceil(i * duration.value * samples / batch) for i in range(1, 2000)}
        assert set(ticks[:-1]) == {step for step in due if step < t.total_steps}
    else:
        period = ticks[0]
        assert all(b - a == period for a, b in pairwise(ticks[:-1]))
        assert ticks[-1] - ([0, *ticks][-2]) <= period


# ---- learning rate

@pytest.mark.parametrize(("step", "factor"), [(250, .5), (500, 1), (4999, .886878), (9999, .568192), (1, 1 / 500),
                                              (20000, .1)])
def test_learning_rate_vectors(step: int, factor: float) -> None:
    t = timeline(duration="20000 steps")
    config = OptimizerConfig(lr=3e-4, warmup="500 steps", min_lr_ratio=.1)
    assert lr_at(step, (), timeline=t, schedule=config) == pytest.approx(3e-4 * factor, rel=1e-6)


@given(st.integers(2, 400), st.integers(0, 400), st.floats(0, 1), st.floats(1e-6, 10))
def test_the_rate_rises_to_its_peak_falls_to_its_minimum_and_does_not_jump(
    total: int, warmup: int, ratio: float, lr: float
) -> None:
    warmup = min(warmup, total - 1)
    t = timeline(duration=f"{total} steps")
    config = OptimizerConfig(lr=lr, warmup=f"{warmup} steps", min_lr_ratio=ratio)
    rates = [lr_at(step, (), timeline=t, schedule=config) for step in range(1, total + 1)]
    noise = lr * 1e-9
    assert rates[-1] == pytest.approx(lr * ratio, rel=1e-9, abs=noise)
    assert all(-noise <= rate <= lr + noise for rate in rates)
    rise, fall = rates[:warmup], rates[max(0, warmup - 1):]
    assert all(a < b for a, b in pairwise(rise))
    assert all(a >= b - noise for a, b in pairwise(fall))
    assert all(rate >= lr * ratio - noise for rate in fall)
    if warmup:
        assert rates[warmup - 1] == pytest.approx(lr)
    # A line changes by at most 1/warmup per step, and a cosine by at most pi/2 over its length.
    steepest = lr * max(1 / max(1, warmup), math.pi / 2 / (total - warmup)) + noise
    assert all(abs(a - b) <= steepest for a, b in pairwise(rates))


def test_without_warmup_the_first_step_is_already_on_the_cosine() -> None:
    first = lr_at(1, (), timeline=timeline(duration="4 steps"), schedule=OptimizerConfig(lr=1.0, warmup="0 steps"))
    assert first == pytest.approx(.5 * (1 + math.cos(math.pi / 4)))


def test_warmup_in_epochs_and_shares_is_that_many_steps() -> None:
    t = timeline(100, 16, "20 epochs")  # 125 steps
    for warmup, steps in (("2 epochs", 13), ("10 %", 13), ("13 steps", 13)):
        config = OptimizerConfig(lr=1.0, warmup=warmup)
        assert lr_at(steps, (), timeline=t, schedule=config) == 1.0
        assert lr_at(steps - 1, (), timeline=t, schedule=config) == pytest.approx((steps - 1) / steps)
        assert lr_at(steps + 1, (), timeline=t, schedule=config) < 1.0


def test_a_minimum_of_one_is_a_constant_rate_after_the_warmup() -> None:
    config = OptimizerConfig(lr=2.0, warmup="3 steps", min_lr_ratio=1)
    rates = [lr_at(step, (), timeline=timeline(duration="9 steps"), schedule=config) for step in range(3, 10)]
    assert rates == [2.0] * 7


def test_after_a_restart_the_rate_rises_to_the_schedule() -> None:
    t = timeline(duration="100 steps")
    schedule = OptimizerConfig(lr=2.0, warmup="10 steps")
    scheduled = [lr_at(step, (), timeline=t, schedule=schedule) for step in range(41, 47)]
    rates = [lr_at(step, (Restart(40, 4),), timeline=t, schedule=schedule) for step in range(41, 47)]
    assert rates == [scheduled[3] * n / 4 for n in (1, 2, 3)] + scheduled[3:]
    two = (Restart(40, 50), Restart(43, 2))
    rates = [lr_at(step, two, timeline=t, schedule=schedule) for step in range(43, 47)]
    assert rates == [0.0, scheduled[4] / 2, *scheduled[4:]], "only the last restart counts"


@pytest.mark.parametrize(("step", "factor"), [
    (250, .5), (500, 1), (4999, .886878), (5000, 0), (5001, .00882), (5050, .440989), (5100, .881979), (9999, .568192),
    (10050, .280437), (15100, .233086), (20000, .1)])
def test_the_jagged_cosine_of_relora(step: int, factor: float) -> None:
    """5,000 steps per cycle, of which 100 rewarm."""
    restarts = (5000, 10000, 15000)
    found = rate_factor(step, total=20000, warmup=500, min_ratio=.1, restarts=restarts, rewarm=100)
    assert found == pytest.approx(factor, abs=1e-6)
    assert found == rate_factor(step, total=20000, warmup=500, min_ratio=.1, restarts=restarts, rewarm=[100] * 3)


def test_each_restart_may_rewarm_for_a_time_of_its_own() -> None:
    at = partial(rate_factor, total=1000, warmup=0, min_ratio=1.0, restarts=(100, 200), rewarm=(10, 50))
    assert [at(step) for step in (105, 110, 200, 225, 250)] == [.5, 1.0, 0.0, .5, 1.0]
    with pytest.raises(ValueError, match="1 numbers of steps to rewarm for 2 restarts"):
        rate_factor(1, total=1000, warmup=0, min_ratio=1.0, restarts=(100, 200), rewarm=(10,))


@pytest.mark.parametrize("every", ["1 step", "7 steps", "3 epochs", "1 epoch", "0.01 epochs", "500 steps"])
def test_the_next_ticks_are_those_of_all(every: str) -> None:
    timeline = Timeline(1000, 96, Duration("12 epochs"))
    ticks = sorted(timeline.ticks(Duration(every)))
    for step in range(timeline.total_steps + 1):
        expected = [tick for tick in ticks if tick > step][:3]
        assert timeline.next_ticks(step, Duration(every), 3) == expected
