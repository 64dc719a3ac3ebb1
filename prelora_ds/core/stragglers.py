"""Detect slow ranks by the time they spend before a collective: inside it, all ranks take equally long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

FACTOR = 1.5  # a slow rank takes more than this times the median of all ranks,
SHARE = 0.05  # and is slower than the median by more than this share of a step


@dataclass(frozen=True)
class Straggler:
    """A rank and the activity at which it is slow.

    seconds, usual: seconds per step of this rank and of the median rank, as medians over the window.
    windows: the number of windows in which it was slow so far.
    """

    rank: int
    host: str
    what: str
    seconds: float
    usual: float
    windows: int = 1

    def __str__(self) -> str:
        often = f" ({self.windows} times so far)" if self.windows > 1 else ""
        return (f"host {self.host} (rank {self.rank}) is slow{often}: {self.what} "
                f"{self.seconds * 1e3:.1f} ms per step, the median of all ranks is "
                f"{self.usual * 1e3:.1f} ms")


class StragglerWatch:
    """Looks for stragglers in one run.

    hosts: the host of each rank.
    over: the number of steps per window.

    A rank that stays slow is reported in its 1st, 2nd, 4th, 8th, ... slow window, so that the log
    of a run of several weeks stays short.
    """

    def __init__(self, hosts: Sequence[str], over: int = 20) -> None:
        self.hosts = hosts
        self.over = over
        self._steps: list[float] = []
        self._seconds: dict[str, list[tuple[float, ...]]] = {}
        self._slow_windows: Counter[tuple[int, str]] = Counter()

    def add(self, step_s: float, **seconds: Sequence[float]) -> list[Straggler]:
        """Add one step: its duration on this rank, and for each activity the seconds of every rank.

        Returns the stragglers to report, which are found only at the end of a window.
        """
        self._steps.append(step_s)
        for what, of_ranks in seconds.items():
            self._seconds.setdefault(what, []).append(tuple(of_ranks))
        if len(self._steps) < self.over:
            return []
        stragglers = [straggler for what in self._seconds for straggler in self._slow(what)]
        self._steps = []
        self._seconds = {}
        return stragglers

    def _slow(self, what: str) -> list[Straggler]:
        of_ranks = [median(values) for values in zip(*self._seconds[what], strict=True)]
        usual = median(of_ranks)
        least = SHARE * median(self._steps)
        stragglers = []
        for rank, seconds in enumerate(of_ranks):
            if seconds > FACTOR * usual and seconds - usual > least:
                self._slow_windows[rank, what] += 1
                stragglers.append(Straggler(rank, self.hosts[rank], what, seconds, usual,
                                            self._slow_windows[rank, what]))
        return [straggler for straggler in stragglers if straggler.windows.bit_count() == 1]
