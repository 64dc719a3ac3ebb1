"""A curve of a long log in a bounded number of points, which keep every extreme."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

MOST_POINTS = 2000


class Point(NamedTuple):
    """hours: of training, from the first step of the run."""

    step: int
    hours: float
    value: float


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most ``most`` (at least 4) of ``points``, which are ordered by step.

    The range of steps is cut into intervals of equal width, and the lowest and the highest point of each stay, and
    the first and the last of all. So no extreme is lost, and nothing is smoothed.
    """
    if len(points) <= most:
        return list(points)
    first, last = points[0].step, points[-1].step
    intervals = (most - 2) // 2
    width = (last - first) / intervals or 1.0
    extremes: dict[int, tuple[int, int]] = {}  # interval -> indices of its lowest and its highest point
    for index, point in enumerate(points):
        interval = min(int((point.step - first) / width), intervals - 1)
        low, high = extremes.get(interval, (index, index))
        extremes[interval] = (index if point.value < points[low].value else low,
                              index if point.value > points[high].value else high)
    kept = {0, len(points) - 1}.union(*extremes.values())
    return [points[index] for index in sorted(kept)]


class Curve:
    """Collects the points of one column, in the order of their steps, and thins them when there are too many."""

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most = most
        self._steps = array("q")
        self._hours = array("d")
        self._values = array("d")

    def add(self, step: int, hours: float, value: float) -> None:
        self._steps.append(step)
        self._hours.append(hours)
        self._values.append(value)
        if len(self._steps) > 2 * self._most:
            kept = thin(self._all(), self._most)
            self._steps = array("q", [point.step for point in kept])
            self._hours = array("d", [point.hours for point in kept])
            self._values = array("d", [point.value for point in kept])

    def points(self, most: int | None = None) -> list[Point]:
        """Return at most ``most`` points, by default as many as the curve was made for."""
        return thin(self._all(), self._most if most is None else min(most, self._most))

    def at(self, step: int) -> Point | None:
        """Return the last point up to ``step``, or None if there is none."""
        index = bisect_right(self._steps, step) - 1
        return None if index < 0 else Point(self._steps[index], self._hours[index], self._values[index])

    def _all(self) -> list[Point]:
        return list(map(Point, self._steps, self._hours, self._values))
