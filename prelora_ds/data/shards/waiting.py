"""Waiting for files that other processes write, also those of other hosts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

LONGEST_PAUSE_S = 5.0  # between two looks


def await_files(condition: Callable[[], bool], folder: Path, patience_s: float) -> bool:
    """Whether ``condition`` came true while files in ``folder`` still changed."""
    newest, since, pause_s = None, time.monotonic(), 0.1
    while not condition():
        now = _newest(folder)
        if now != newest:
            newest, since = now, time.monotonic()
        elif time.monotonic() - since > patience_s:
            return False
        time.sleep(pause_s)
        pause_s = min(1.3 * pause_s, LONGEST_PAUSE_S)
    return True


def _newest(folder: Path) -> tuple[float, int]:
    """Changes whenever a file in ``folder`` is written to. Sizes as well: clocks of other hosts may
    stand still."""
    times, sizes = [0.0], 0
    try:
        for entry in [*os.scandir(folder), *os.scandir(folder / "work")]:
            stat = entry.stat()
            times.append(stat.st_mtime)
            sizes += stat.st_size
    except FileNotFoundError:
        pass  # renamed under our eyes
    return max(times), sizes
