"""Which rank holds up the others: told by what it does before they meet, since in a collective all take as long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

FACTOR = 1.5  # times the median of all ranks
SHARE = 0.05  # of the step: less than that holds up nobody


@dataclass(frozen=True)
class Straggler:
    """A rank and what it is slow at; seconds a step, medians over the window."""

    rank: int
    host: str
    what: str
    seconds: float
    usual: float

    def __str__(self) -> str:
        return (f"host {self.host} (rank {self.rank}) is slow: {self.what} {self.seconds * 1e3:.1f} ms a step, the "
                f"median of all ranks is {self.usual * 1e3:.1f} ms")


class StragglerWatch:
    """Of a run. hosts: of each rank; over: steps of a window."""

    def __init__(self, hosts: Sequence[str], over: int = 20) -> None:
        self.hosts, self.over = hosts, over
        self._steps: list[float] = []
        self._seconds: dict[str, list[tuple[float, ...]]] = {}

    def add(self, step_s: float, **seconds: Sequence[float]) -> list[Straggler]:
        """One step of this rank, and by what was done the seconds of every rank. At the end of a window its stragglers,
        else nothing."""
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
        return [Straggler(rank, self.hosts[rank], what, seconds, usual) for rank, seconds in enumerate(of_ranks)
                if seconds > FACTOR * usual and seconds - usual > least]
