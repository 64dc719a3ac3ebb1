"""A watchdog thread in every rank, so that one lost rank does not hang the others.

It ends a process that makes no progress, also while the main thread is blocked in a collective.
Other reasons to end a process (a lock that is no longer held, a launcher that is gone) are added as
checks.
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

from prelora_ds.console import stamped
from prelora_ds.errors import HANG_EXIT_CODE, ORPHAN_EXIT_CODE
from prelora_ds.run.stop import StopRequest

# Returns None, or the exit code to end with and the reason.
Check = Callable[[], tuple[int, str] | None]

TICK_S = 1.0
SHARED_DISK_S = 5.0  # between two reads of a file that all ranks read
# A collective waits this much longer than the guard. When its time is over, NCCL aborts the process, which leaves no
# record.
AFTER_GUARD_S = 300.0
ORPHAN_LIMIT_S = 120.0  # without a step, so that a running switch or checkpoint can finish


@dataclass
class _Watched:
    check: Check
    every_s: float
    due: float = 0.0
    failed: bool = False


class Guard:
    """Ends the process with exit code 85 and all stacks after ``limit_s`` seconds without a `beat`.

    stop: where an orphaned rank requests a checkpoint before it ends; without it the rank ends at
    once.
    before_exit: called with the exit code and the reason before the guard ends the process.
    orphaned: why this rank is orphaned; empty if it is not.
    """

    def __init__(
        self, limit_s: float = math.inf, rank: int = 0, stop: StopRequest | None = None
    ) -> None:
        self.limit_s = limit_s
        self.rank = rank
        self.stop_request = stop
        self.before_exit: Callable[[int, str], None] = lambda code, why: None
        self.orphaned = ""
        self._watched: list[_Watched] = []
        self._beat = time.monotonic()
        self._ended = threading.Event()

    def start(self) -> Guard:
        threading.Thread(target=self._run, name="guard", daemon=True).start()
        return self

    def watch(self, check: Check, every_s: float = SHARED_DISK_S) -> None:
        """Call ``check`` every ``every_s`` seconds, and end the process if it returns an exit code.

        If steps have begun, code 87 (an orphaned rank) first requests a stop with a checkpoint. A
        check that raises is reported once and called again.
        """
        self._watched.append(_Watched(check, every_s))

    def beat(self, longer_s: float = 0.0) -> None:
        """Report progress; allow ``longer_s`` extra seconds until the next call."""
        self._beat = time.monotonic() + longer_s

    def stop(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(min(TICK_S, self.limit_s / 10)):
            for watched in self._watched:
                if time.monotonic() >= watched.due:
                    self._run_check(watched)
            idle_s = time.monotonic() - self._beat
            if self.orphaned and idle_s > ORPHAN_LIMIT_S:
                self.end(
                    ORPHAN_EXIT_CODE,
                    f"error (rank {self.rank}): {self.orphaned}; the run was asked to stop, but "
                    f"there was no progress for {idle_s:.0f} s; stacks of all threads:",
                    stacks=True,
                )
            if idle_s > self.limit_s:
                self.end(
                    HANG_EXIT_CODE,
                    f"error (rank {self.rank}): no progress for {idle_s:.0f} s "
                    f"(guard.hang_limit is {self.limit_s:.0f} s); stacks of all threads:",
                    stacks=True,
                )

    def check_now(self) -> None:
        """Call all checks now."""
        for watched in self._watched:
            self._run_check(watched)

    def _run_check(self, watched: _Watched) -> None:
        watched.due = time.monotonic() + watched.every_s
        try:
            verdict = watched.check()
        except Exception as error:
            # Keep this thread alive: without it a hang would block the job forever.
            if not watched.failed:
                say(
                    f"warning (rank {self.rank}): a check of the guard failed and is retried every "
                    f"{watched.every_s:g} s: {type(error).__name__}: {error}"
                )
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
            self.before_exit(code, why)
        finally:
            end_now(code, why, stacks=stacks)


def say(message: str) -> None:
    """Print with the time to standard error, from any thread, even if standard error is closed."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(stamped(message), file=sys.__stderr__, flush=True)


def end_now(code: int, message: str, *, stacks: bool = False) -> NoReturn:
    """End the process at once, from any thread and whatever the other threads do."""
    say(message)
    if stacks:
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
    os._exit(code)
