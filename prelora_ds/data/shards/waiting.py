"""Waiting for files that other processes write, on this or another host."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

LONGEST_PAUSE_S = 5.0  # between two checks


def await_files(condition: Callable[[], bool], folder: Path, patience_s: float) -> bool:
    """Wait for ``condition``; return False if no file in ``folder`` changes for ``patience_s``."""
    last_state = None
    unchanged_since = time.monotonic()
    pause_s = 0.1
    while not condition():
        state = _state_of(folder)
        if state != last_state:
            last_state = state
            unchanged_since = time.monotonic()
        elif time.monotonic() - unchanged_since > patience_s:
            return False
        time.sleep(pause_s)
        pause_s = min(1.3 * pause_s, LONGEST_PAUSE_S)
    return True


def _state_of(folder: Path) -> tuple[float, int]:
    """Return a value that changes whenever a file in ``folder`` is written.

    It contains sizes too, because the clock of another host may stand still.
    """
    times = [0.0]
    sizes = 0
    try:
        for entry in [*os.scandir(folder), *os.scandir(folder / "work")]:
            stat = entry.stat()
            times.append(stat.st_mtime)
            sizes += stat.st_size
    except FileNotFoundError:
        pass  # renamed while we were looking
    return max(times), sizes
