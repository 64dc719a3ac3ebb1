"""The wish to stop: a signal, or a time limit that comes near. The loop acts on it at the end of a step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

# A launcher that is ended passes its signal on more than once; that is no second wish.
ONE_WISH_S = 2.0


class StopRequest:
    """Asked for by SIGTERM, SIGHUP, SIGUSR1 or `ask`, or by a time limit.

    walltime_s: that limit (`checkpoint.walltime`), in seconds since this was made.

    SIGTERM and SIGHUP are wishes once steps are taken. Before that there is nothing to save, and
    they end the process, also within a call that no handler interrupts: a launcher whose other
    rank was refused would wait for half a minute.
    """

    def __init__(self, walltime_s: float | None = None) -> None:
        self.walltime_s, self._begun, self._asked_at, self._longest_s = walltime_s, time.monotonic(), 0.0, 0.0
        self.reason: str | None = None
        self._signalled: float | None = None
        self._stepping = False

    def install(self) -> StopRequest:
        """Take SIGUSR1. The handler only makes a note: whoever would read what it prints may be gone."""
        signal.signal(signal.SIGUSR1, self._on_signal)
        return self

    def begin_steps(self) -> None:
        """Take SIGTERM too, and the SIGHUP of a closed terminal unless `nohup` has it ignored."""
        self._stepping = True
        signal.signal(signal.SIGTERM, self._on_signal)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._on_signal)

    def ask(self, reason: str) -> bool:
        """Ask from any thread. Returns whether steps have begun: only then is a wish acted on."""
        if self._stepping and self.reason is None:
            self.reason = reason
        return self._stepping

    def asked(self, save_s: float = 0.0) -> bool:
        """Whether this rank wants to stop; to be called once a step. ``save_s``: seconds that a checkpoint takes."""
        now = time.monotonic()
        if self._asked_at:
            self._longest_s = max(self._longest_s, now - self._asked_at)
        self._asked_at = now
        if self.walltime_s is not None and self.reason is None:
            reserve = min(300.0, 0.05 * self.walltime_s) + 2 * (save_s + self._longest_s)
            if now - self._begun + reserve > self.walltime_s:
                self.reason = f"{now - self._begun:.0f} s of checkpoint.walltime = {self.walltime_s:.0f} s are over"
        return self.reason is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # One wish comes by several ways (scheduler, supervisor, terminal). Only SIGTERM insists.
        again = self._signalled is not None and now - self._signalled > ONE_WISH_S
        if again and number == signal.SIGTERM:
            os._exit(128 + number)
        if self._signalled is None:
            self._signalled, self.reason = now, signal.Signals(number).name
