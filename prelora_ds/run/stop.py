"""Requests to stop, by a signal or a time limit. The loop acts on them at the end of a step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

# Launchers forward their signal more than once: within this time it is the same request.
DEBOUNCE_S = 2.0


class StopRequest:
    """A stop requested by SIGTERM, SIGHUP, SIGUSR1 or `ask`, or by a time limit.

    walltime_s: the time limit (`checkpoint.walltime`), in seconds since this object was created.

    Once steps have begun, SIGTERM and SIGHUP request a stop. Before, there is nothing to save, so
    they keep their default action and end the process even inside a call that no handler
    interrupts. Otherwise a launcher with a refused rank would have to wait half a minute for the
    others.
    """

    def __init__(self, walltime_s: float | None = None) -> None:
        self.walltime_s = walltime_s
        self.reason: str | None = None
        self._started_at = time.monotonic()
        self._asked_at = 0.0
        self._longest_s = 0.0
        self._signalled_at: float | None = None
        self._stepping = False

    def install(self) -> StopRequest:
        """Handle SIGUSR1.

        The handler only sets a flag, because the reader of what it would print may be gone.
        """
        signal.signal(signal.SIGUSR1, self._on_signal)
        return self

    def begin_steps(self) -> None:
        """Handle SIGTERM too, and the SIGHUP of a closed terminal unless `nohup` ignores it."""
        self._stepping = True
        signal.signal(signal.SIGTERM, self._on_signal)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._on_signal)

    def ask(self, reason: str) -> bool:
        """Request a stop, from any thread.

        Returns whether steps have begun, because only then the request is acted on.
        """
        if self._stepping and self.reason is None:
            self.reason = reason
        return self._stepping

    def asked(self, save_s: float = 0.0) -> bool:
        """Whether this rank requests a stop; called once per step.

        save_s: seconds that a checkpoint takes.
        """
        now = time.monotonic()
        if self._asked_at:
            self._longest_s = max(self._longest_s, now - self._asked_at)
        self._asked_at = now
        if self.walltime_s is not None and self.reason is None:
            used = now - self._started_at
            reserve = min(300.0, 0.05 * self.walltime_s) + 2 * (save_s + self._longest_s)
            if used + reserve > self.walltime_s:
                self.reason = f"checkpoint.walltime: {used:.0f} s of {self.walltime_s:.0f} s used"
        return self.reason is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # One request arrives by several paths (scheduler, supervisor, terminal). Only a repeated
        # SIGTERM forces an exit.
        repeated = self._signalled_at is not None and now - self._signalled_at > DEBOUNCE_S
        if repeated and number == signal.SIGTERM:
            os._exit(128 + number)
        if self._signalled_at is None:
            self._signalled_at = now
            self.reason = signal.Signals(number).name
