"""A thread in every rank that ends a process that makes no progress, so that one lost rank hangs no others.

It runs while the main thread sits in a collective. Other reasons to end a process (a lock that is
no longer held, a launcher that is gone) are given to it as checks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from prelora_ds.errors import HANG_EXIT_CODE, ORPHAN_EXIT_CODE
from prelora_ds.run.stop import StopRequest

Check = Callable[[], tuple[int, str] | None]  # None, or the exit code to end with and why

TICK_S = 1.0
SHARED_DISK_S = 5.0  # between two looks at a file that all ranks look at
ORPHAN_LIMIT_S = 120.0  # without a step: a switch or a checkpoint that is under way may still end


@dataclass
class _Watched:
    check: Check
    every_s: float
    due: float = 0.0
    failed: bool = False


class Guard:
    """Ends the process with exit code 85 and the stacks of all threads when no `beat` came for ``limit_s`` seconds.

    stop: where an orphan asks for a checkpoint before it ends; without one it ends at once.
    """

    def __init__(self, limit_s: float = math.inf, rank: int = 0,
                 stop: StopRequest | None = None) -> None:
        self.limit_s, self.rank, self.stop_request = limit_s, rank, stop
        self.last_words: Callable[[int, str], None] = lambda code, why: None  # before it ends the process
        self._watched: list[_Watched] = []
        self._beat, self._ended = time.monotonic(), threading.Event()
        self.orphaned = ""  # why, once it is one

    def start(self) -> Guard:
        threading.Thread(target=self._run, name="guard", daemon=True).start()
        return self

    def watch(self, check: Check, every_s: float = SHARED_DISK_S) -> None:
        """Call ``check`` every ``every_s`` seconds; the first that answers ends the process.

        The process ends with the code of the answer. Where steps have begun, code 87 (an orphan)
        first asks the run to stop with a checkpoint.

        A check that raises is reported once and called again.
        """
        self._watched.append(_Watched(check, every_s))

    def beat(self, longer_s: float = 0.0) -> None:
        """The process has got on; what comes next may take ``longer_s`` more than the limit."""
        self._beat = time.monotonic() + longer_s

    def stop(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(min(TICK_S, self.limit_s / 10)):
            for watched in self._watched:
                if time.monotonic() >= watched.due:
                    self._look(watched)
            still = time.monotonic() - self._beat
            if self.orphaned and still > ORPHAN_LIMIT_S:
                self.end(ORPHAN_EXIT_CODE, f"error (rank {self.rank}): {self.orphaned}; the run was "
                         f"asked to stop, and took no step for {still:.0f} s; where this process stands:",
                         stacks=True)
            if still > self.limit_s:
                self.end(HANG_EXIT_CODE, f"error (rank {self.rank}): no step for {still:.0f} s (guard.hang_limit is "
                         f"{self.limit_s:.0f} s); where this process stands:", stacks=True)

    def look(self) -> None:
        """Call all checks now."""
        for watched in self._watched:
            self._look(watched)

    def _look(self, watched: _Watched) -> None:
        watched.due = time.monotonic() + watched.every_s
        try:
            verdict = watched.check()
        except Exception as error:  # without this thread a hang would hold the job for ever
            if not watched.failed:
                say(f"warning (rank {self.rank}): a check of the guard failed, and is tried again "
                    f"every {watched.every_s:g} s: {type(error).__name__}: {error}")
            watched.failed = True
            return
        if verdict is None:
            return
        code, why = verdict
        if code != ORPHAN_EXIT_CODE or self.stop_request is None or not self.stop_request.ask(why):
            self.end(code, f"error (rank {self.rank}): {why}")
        if not self.orphaned:
            self.orphaned = why
            self._beat = max(self._beat, time.monotonic())

    def end(self, code: int, why: str, *, stacks: bool = False) -> NoReturn:
        """End the process, from any thread."""
        try:
            self.last_words(code, why)
        finally:
            end_now(code, why, stacks=stacks)


def say(message: str) -> None:
    """Print on standard error from any thread; one that nobody reads any more stops nothing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(message, file=sys.__stderr__, flush=True)


def end_now(code: int, message: str, *, stacks: bool = False) -> NoReturn:
    """Leave from any thread, whatever the others do."""
    say(message)
    if stacks:
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
    os._exit(code)
