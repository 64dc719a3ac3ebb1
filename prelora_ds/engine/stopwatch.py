"""Time forward passes on the device's own clock, if it has one, so that the host need not wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Stopwatch:
    """Sums the seconds spent in `running`; `read` returns and resets the sum."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time the body of the context."""
        from deepspeed.accelerator import get_accelerator

        if get_accelerator().device_name() == "cpu":
            begun = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begun
            return

        begin = get_accelerator().Event(enable_timing=True)
        end = get_accelerator().Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    def read(self) -> float:
        """Return the seconds since the last call.

        On a GPU this waits for the last forward pass.
        """
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        seconds = self._seconds
        self._seconds = 0.0
        self._events = []
        return seconds
