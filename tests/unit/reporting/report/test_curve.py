from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.reporting.report.curve import Curve, Point, thin

VALUES = st.floats(-1e6, 1e6)


@st.composite
def curves(draw: st.DrawFn) -> list[Point]:
    values = draw(st.lists(VALUES, min_size=1, max_size=400))
    gaps = draw(st.lists(st.integers(1, 50), min_size=len(values), max_size=len(values)))
    step, points = 0, []
    for gap, value in zip(gaps, values, strict=True):
        step += gap
        points.append(Point(step, step / 60, value))
    return points


@given(curves(), st.integers(4, 60))
def test_a_thinned_curve_has_the_extremes_and_the_ends_of_the_whole_one(points: list[Point], most: int) -> None:
    kept = thin(points, most)
    assert len(kept) <= max(most, 4)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert kept == [point for point in points if point in set(kept)]  # in order, and nothing is made up
    for extreme in (min, max):
        assert extreme(p.value for p in kept) == extreme(p.value for p in points)


@given(curves(), st.integers(4, 60))
def test_a_curve_that_is_thinned_while_it_is_read_keeps_the_same(points: list[Point], most: int) -> None:
    curve = Curve(most)
    for point in points:
        curve.add(*point)
    kept = curve.points()
    assert len(kept) <= most and set(kept) <= set(points)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    for extreme in (min, max):
        assert extreme(p.value for p in kept) == extreme(p.value for p in points)


def test_a_spike_of_a_single_step_survives() -> None:
    curve = Curve(100)
    for step in range(1, 100_001):
        curve.add(step, step / 3600, 50.0 if step == 77_777 else step % 7)
    assert Point(77_777, 77_777 / 3600, 50.0) in curve.points()
    assert len(curve.points()) <= 100


def test_a_short_curve_is_untouched() -> None:
    curve = Curve(10)
    points = [Point(step, step / 2, float(step)) for step in range(10)]
    for point in points:
        curve.add(*point)
    assert curve.points() == points
    assert curve.points(4) == [points[0], points[-1]]


def test_the_value_at_a_step_is_the_last_one_up_to_it() -> None:
    curve = Curve()
    curve.add(10, 1.0, 5.0)
    curve.add(20, 2.0, 6.0)
    assert [curve.at(step) for step in (9, 10, 19, 25)] == [None, (10, 1.0, 5.0), (10, 1.0, 5.0), (20, 2.0, 6.0)]
