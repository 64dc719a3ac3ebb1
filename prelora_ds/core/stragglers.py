"""Which rank holds up the others: told by what it does before they meet, since in a collective all take as long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

FACTOR = 1.5  # times the median of all ranks
SHARE = 0.05  # of the step: less than that holds up nobody


@dataclass(frozen=True)
class Straggler:
    """A rank and what it is slow at; seconds per step, medians over the window.

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
    """Of a run. hosts: of each rank; over: steps of a window.

    A rank that stays slow is reported in its 1st, 2nd, 4th, 8th, ... slow window, so that the log
    of a run of weeks stays short.
    """

    def __init__(self, hosts: Sequence[str], over: int = 20) -> None:
        self.hosts, self.over = hosts, over
        self._steps: list[float] = []
        self._seconds: dict[str, list[tuple[float, ...]]] = {}
        self._slow_windows: Counter[tuple[int, str]] = Counter()

    def add(self, step_s: float, **seconds: Sequence[float]) -> list[Straggler]:
        """One step of this rank, and by what was done the seconds of every rank.

        Returns the stragglers to report; there are none within a window.
        """
        self._steps.append(step_s)
        for what, of_ranks in seconds.items():
            self._seconds.setdefault(what, []).append(tuple(of_ranks))
        if len(self._steps) < self.over:
            return []
        found = [straggler for what in self._seconds for straggler in self._slow(what)]
        self._steps, self._seconds = [], {}
        return found

    def _slow(self, what: str) -> list[Straggler]:
        of_ranks = [median(values) for values in zip(*self._seconds[what], strict=True)]
        usual, least = median(of_ranks), SHARE * median(self._steps)
        found = []
        for rank, seconds in enumerate(of_ranks):
            if seconds > FACTOR * usual and seconds - usual > least:
                self._slow_windows[rank, what] += 1
                found.append(Straggler(rank, self.hosts[rank], what, seconds, usual,
                                       self._slow_windows[rank, what]))
        return [straggler for straggler in found if straggler.windows.bit_count() == 1]
