"""Detect slow ranks by the time they spend before a collective: inside it, all ranks take equally long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

FACTOR = 1.5  # a slow rank takes more than this times the median of all ranks,
SHARE = 0.05  # and is slower than the median by more than this share of a step
WORSE = 2.0  # a slow rank is reported again if it takes this many times as long as in its last report


class Change(StrEnum):
    """What has changed for a rank."""

    BEGAN = "began"  # it was not slow before
    GREW = "grew"  # it takes WORSE times as long as in its last report
    ENDED = "ended"  # it is not slow any more


@dataclass(frozen=True)
class Straggler:
    """A rank that becomes slow at an activity, becomes slower, or is no longer slow.

    seconds, usual: seconds per step of this rank and of the median rank, as medians over the window.
    windows: for how many windows in a row it has been slow.
    times: how often it has become slow so far.
    """

    rank: int
    host: str
    what: str
    seconds: float
    usual: float
    windows: int = 1
    change: Change = Change.BEGAN
    times: int = 1

    def __str__(self) -> str:
        often = f" (for the {self.times}th time)" if self.times > 2 else " (again)" if self.times == 2 else ""
        windows = "1 window" if self.windows == 1 else f"{self.windows} windows"
        state = {Change.BEGAN: f"is slow{often}", Change.GREW: "is slower than before",
                 Change.ENDED: f"is no longer slow, after {windows}"}[self.change]
        return (f"host {self.host} (rank {self.rank}) {state}: {self.what} "
                f"{self.seconds * 1e3:.1f} ms per step, the median of all ranks is "
                f"{self.usual * 1e3:.1f} ms")


@dataclass
class _Spell:
    """A rank has been slow for ``windows`` windows in a row. seconds: what was reported last."""

    seconds: float
    reported: bool
    windows: int = 1


class StragglerWatch:
    """Looks for stragglers in one run.

    hosts: the host of each rank.
    over: the number of steps per window.

    A rank is reported when it becomes slow, when it becomes much slower, and when it is no longer slow. A rank that
    becomes slow again and again is reported the 1st, 2nd, 4th, 8th, ... time, so that the log of a run of several weeks
    stays short.
    """

    def __init__(self, hosts: Sequence[str], over: int = 20) -> None:
        self.hosts = hosts
        self.over = over
        self._steps: list[float] = []
        self._seconds: dict[str, list[tuple[float, ...]]] = {}
        self._slow: dict[tuple[int, str], _Spell] = {}
        self._times: Counter[tuple[int, str]] = Counter()

    def add(self, step_s: float, **seconds: Sequence[float]) -> list[Straggler]:
        """Add one step: its duration on this rank, and for each activity the seconds of every rank.

        Returns what to report, which is found only at the end of a window.
        """
        self._steps.append(step_s)
        for what, of_ranks in seconds.items():
            self._seconds.setdefault(what, []).append(tuple(of_ranks))
        if len(self._steps) < self.over:
            return []
        changes = [change for what in self._seconds for change in self._changes(what)]
        self._steps = []
        self._seconds = {}
        return changes

    def _changes(self, what: str) -> Iterator[Straggler]:
        of_ranks = [median(values) for values in zip(*self._seconds[what], strict=True)]
        usual = median(of_ranks)
        least = SHARE * median(self._steps)
        for rank, seconds in enumerate(of_ranks):
            is_slow = seconds > FACTOR * usual and seconds - usual > least
            found = self._change(rank, what, seconds, is_slow=is_slow)
            if found is not None:
                change, windows = found
                yield Straggler(rank, self.hosts[rank], what, seconds, usual, windows, change, self._times[rank, what])

    def _change(self, rank: int, what: str, seconds: float, *, is_slow: bool) -> tuple[Change, int] | None:
        """Return what to report of a rank after a window, and for how many windows it has been slow."""
        spell = self._slow.get((rank, what))
        if not is_slow:
            self._slow.pop((rank, what), None)
            return (Change.ENDED, spell.windows) if spell is not None and spell.reported else None
        if spell is None:
            self._times[rank, what] += 1
            spell = self._slow[rank, what] = _Spell(seconds, self._times[rank, what].bit_count() == 1)
            return (Change.BEGAN, 1) if spell.reported else None
        spell.windows += 1
        if not spell.reported or seconds < WORSE * spell.seconds:
            return None
        spell.seconds = seconds
        return Change.GREW, spell.windows
