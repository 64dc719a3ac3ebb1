"""A thread in every rank that ends a process which goes nowhere, so that one lost rank hangs no others.

It runs while the main thread sits in a collective. Other reasons to end a process (a lease that is no longer held) are
given to it as checks.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from prelora_ds.core.errors import HANG_EXIT_CODE

Check = Callable[[], tuple[int, str] | None]  # None, or the exit code to end with and why


class Guard:
    """Ends the process with exit code 85 and the stacks of all threads when no `beat` came for ``limit_s`` seconds.

    checks: looked at a few times a minute; the first that answers ends the process with its code.
    """

    def __init__(self, limit_s: float, rank: int = 0) -> None:
        self.limit_s, self.rank, self.checks = limit_s, rank, list[Check]()
        self.last_words: Callable[[int, str], None] = lambda code, why: None  # before it ends the process
        self._beat, self._ended = time.monotonic(), threading.Event()

    def start(self) -> Guard:
        threading.Thread(target=self._watch, name="guard", daemon=True).start()
        return self

    def beat(self, longer_s: float = 0.0) -> None:
        """The process has got on; what comes next may take ``longer_s`` more than the limit."""
        self._beat = time.monotonic() + longer_s

    def stop(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(5.0, self.limit_s / 10)):
            for check in self.checks:
                if (verdict := check()) is not None:
                    self.end(*verdict)
            still = time.monotonic() - self._beat
            if still > self.limit_s:
                self.end(HANG_EXIT_CODE, f"error (rank {self.rank}): no step for {still:.0f} s (guard.hang_limit is "
                        f"{self.limit_s:.0f} s); where this process stands:", stacks=True)

    def end(self, code: int, why: str, *, stacks: bool = False) -> NoReturn:
        """End the process, from any thread."""
        self.last_words(code, why)
        end_now(code, why, stacks=stacks)


def end_now(code: int, message: str, *, stacks: bool = False) -> NoReturn:
    """Leave from any thread, whatever the others do. A standard error that nobody reads any more stops nothing."""
    try:
        print(message, file=sys.__stderr__, flush=True)
        if stacks:
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    except (OSError, ValueError, AttributeError):
        pass
    os._exit(code)
