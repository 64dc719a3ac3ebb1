"""Seconds of forward passes, on the device's own clock where it has one: the host does not wait for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Stopwatch:
    """Sums what passes in `running` until `read`, which sets it back."""

    def __init__(self) -> None:
        self._seconds, self._events = 0.0, list[tuple[Any, Any]]()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        from deepspeed.accelerator import get_accelerator

        if get_accelerator().device_name() == "cpu":
            begun = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begun
            return
        begin, end = (get_accelerator().Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    def read(self) -> float:
        """Seconds since the last reading. On a GPU it waits for the last forward pass, which backward has long used."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds
