from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.core.stragglers import FACTOR, StragglerWatch

HOSTS = ["a", "a", "b", "b", "c", "c"]


def window(watch: StragglerWatch, forward: list[float], data: list[float], step_s: float = 1.0):
    found = []
    for _ in range(watch.over):
        found = watch.add(step_s, forward=forward, data=data)
    return found


def test_a_rank_above_one_and_a_half_times_the_median_is_named_with_its_host() -> None:
    slow, = window(StragglerWatch(HOSTS), [0.3, 0.3, 0.3, 0.5, 0.3, 0.3], [0.0] * 6)
    assert (slow.rank, slow.host, slow.what) == (3, "b", "forward")
    assert str(slow) == ("host b (rank 3) is slow: forward 500.0 ms per step, the median of all ranks is 300.0 ms")


def test_waiting_for_data_counts_too_but_not_where_it_is_too_short_to_hold_up_anybody() -> None:
    slow, = window(StragglerWatch(HOSTS), [0.3] * 6, [0.0, 0.0, 0.0, 0.0, 0.0, 0.2])
    assert (slow.host, slow.what) == ("c", "data")
    assert window(StragglerWatch(HOSTS), [0.3] * 6, [0.001, 0.0, 0.0, 0.0, 0.0, 0.02]) == []


def test_one_slow_step_in_a_window_is_no_straggler_and_a_window_ends_where_the_next_begins() -> None:
    watch = StragglerWatch(HOSTS, over=5)
    for step in range(20):
        forward = [0.3] * 5 + [9.0 if step % 5 == 0 else 0.3]
        assert watch.add(1.0, forward=forward) == []


def test_a_rank_is_reported_when_it_becomes_slow_or_much_slower_and_when_it_is_not_slow_any_more() -> None:
    watch, reported = StragglerWatch(["a", "b", "c", "d", "e"], over=2), []
    for number in range(1, 101):
        fourth = 0.9 if number < 30 else 1.7 if number < 40 else 1.9 if number < 80 else 0.3
        ranks = [0.6 if 50 <= number < 55 else 0.3, 0.3, 0.3, fourth, 0.3]
        reported += [(number, slow) for slow in window(watch, ranks, [0.0] * 5)]
    assert [(number, slow.rank, slow.change, slow.windows) for number, slow in reported] == [
        (1, 3, "began", 1), (40, 3, "grew", 40), (50, 0, "began", 1), (55, 0, "ended", 5), (80, 3, "ended", 79)]
    assert [str(slow).partition(":")[0] for _, slow in reported] == [
        "host d (rank 3) is slow", "host d (rank 3) is slower than before", "host a (rank 0) is slow",
        "host a (rank 0) is no longer slow, after 5 windows", "host d (rank 3) is no longer slow, after 79 windows"]


def test_a_rank_that_becomes_slow_again_and_again_is_reported_ever_more_rarely() -> None:
    watch, reported = StragglerWatch(["a", "b", "c"], over=2), []
    for number in range(200):
        reported += window(watch, [0.9 if number % 2 else 0.3, 0.3, 0.3], [0.0] * 3)
    assert [slow.times for slow in reported if slow.change == "began"] == [1, 2, 4, 8, 16, 32, 64]
    assert [slow.times for slow in reported if slow.change == "ended"] == [1, 2, 4, 8, 16, 32, 64]
    assert [str(slow).partition(":")[0] for slow in reported[:5:2]] == [
        "host a (rank 0) is slow", "host a (rank 0) is slow (again)", "host a (rank 0) is slow (for the 4th time)"]


@given(st.lists(st.floats(0.1, 10.0), min_size=2, max_size=16))
def test_who_is_named_is_above_the_factor_and_nobody_else_is(forward: list[float]) -> None:
    hosts = [f"h{i}" for i in range(len(forward))]
    named = {slow.rank for slow in window(StragglerWatch(hosts, over=3), forward, [0.0] * len(forward), 1e-6)}
    usual = sorted(forward)[len(forward) // 2] if len(forward) % 2 else sum(
        sorted(forward)[len(forward) // 2 - 1: len(forward) // 2 + 1]) / 2
    assert named == {rank for rank, seconds in enumerate(forward) if seconds > FACTOR * usual}
