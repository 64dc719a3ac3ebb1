"""A rank's side of `prelora supervise`: it watches the heartbeat, and records how it ends.

Files, in a folder that all hosts share:

    .lease                     the lock of the supervisor
    lease.json                 the supervisor's heartbeat, rewritten while it lives
    attempt-N/rank-R.json      written when rank R of attempt N starts
    attempt-N/exit-R.json      written when rank R ends without success
    attempt-N/fatal-R.txt      the stacks of rank R if a fatal signal ended it, otherwise empty
    attempt-N/DONE, STOPPED    written by rank 0 when the result is complete on disk
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prelora_ds.errors import FENCED_EXIT_CODE, ORPHAN_EXIT_CODE, ConfigError, ExpectedError
from prelora_ds.files import replace_file

HEARTBEAT_FILE = "lease.json"
LOCK_FILE = ".lease"  # held by the one supervisor that may write the heartbeat
PATIENCE_S = 60.0  # for a heartbeat file that does not state its own patience_s
# `AttemptRecord.check` is called every few seconds. After a longer gap the process was suspended.
SUSPENDED_S = 10.0
# An exit this soon after a suspension is probably caused by it.
JUST_RESUMED_S = 60.0


class AttemptRecord:
    """The records of one rank in one attempt.

    folder: DIR/attempt-N; None without a supervisor, and then every method does nothing.
    rank: None while it is not known.

    Raises ConfigError when ``folder`` is not named attempt-N.
    """

    def __init__(self, folder: Path | None, rank: int | None = None) -> None:
        self.folder = folder
        self.rank = rank
        self._last_heartbeat: dict[str, Any] = {}
        self._changed_at = time.monotonic()
        self._stopping = False
        self._checked_at: float | None = None  # None until the first check, after slow imports
        self._suspended_s = 0.0
        self._resumed_at = 0.0

        if folder is None:
            return
        self.attempt = attempt_of(folder)
        if self.attempt is None:
            raise ConfigError("--supervised", str(folder), "was not created by `prelora supervise`",
                              "omit this option: the supervisor adds it")
        if rank is not None:
            start = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
            write_json(folder / f"rank-{rank}.json", start)

    def record_fatal_signals(self) -> None:
        """Record the stacks of all threads when SIGABRT or SIGSEGV ends this process.

        NCCL's watchdog aborts a rank that lost another one, and no line of Python runs after that. Without a
        supervisor the stacks go to standard error.
        """
        stream: Any = sys.__stderr__  # None if it was never open
        if self.folder is not None:
            with contextlib.suppress(OSError):
                stream = (self.folder / f"fatal-{self.rank}.txt").open("w")
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):  # no such stream
            faulthandler.enable(stream)

    def check(self) -> tuple[int, str] | None:
        """Return an exit code and a reason when this rank must end; the guard calls this method.

        The code is 88 when a newer attempt is running, and 87 when the heartbeat did not change
        for the patience_s seconds that the heartbeat file itself states. Only this process's own
        clock is used, so the clocks of hosts may differ. A heartbeat file that is missing or
        cannot be parsed counts as unchanged.
        """
        if self.folder is None or self.attempt is None:
            return None
        now = time.monotonic()
        if self._checked_at is not None and now - self._checked_at > SUSPENDED_S:
            self._suspended_s = now - self._checked_at
            self._resumed_at = now
        heartbeat = _read_heartbeat(self.folder.parent / HEARTBEAT_FILE)

        # The time of a read that stalls counts neither as a suspension nor as a missing heartbeat.
        self._checked_at = time.monotonic()
        self._changed_at += self._checked_at - now

        if heartbeat.get("attempt", self.attempt) > self.attempt:
            return FENCED_EXIT_CODE, (f"superseded: attempt {heartbeat['attempt']} is running, "
                                      f"and this rank belongs to attempt {self.attempt}")
        if heartbeat and heartbeat != self._last_heartbeat:
            self._last_heartbeat = heartbeat
            self._changed_at = self._checked_at
        silent_s = self._checked_at - self._changed_at
        if silent_s > float(self._last_heartbeat.get("patience_s", PATIENCE_S)):
            return ORPHAN_EXIT_CODE, ("the supervisor is gone: no heartbeat for "
                                      f"{silent_s:.0f} s")
        if heartbeat.get("stop") and not self._stopping:
            self._stopping = True
            # The same signal as a batch system's warning: write a checkpoint, then exit with 99.
            os.kill(os.getpid(), signal.SIGUSR1)
        return None

    def record_exit(self, code: int, why: str, blames: Sequence[int] = ()) -> None:
        """Record that this rank ends without success.

        blames: the ranks that failed, if this one did not.
        """
        if self.folder is None:
            return
        name = f"{socket.gethostname()}.{os.getpid()}" if self.rank is None else self.rank
        just_resumed = time.monotonic() - self._resumed_at < JUST_RESUMED_S
        suspended_s = self._suspended_s if just_resumed else 0.0
        if suspended_s:
            why = f"was suspended for {suspended_s:.0f} s, then: {why}"
        write_json(self.folder / f"exit-{name}.json",
                   {"rank": self.rank, "host": socket.gethostname(), "code": code,
                    "slept_s": suspended_s, "blames": list(blames), "why": why})

    def record_error(self, error: ExpectedError) -> None:
        """Record that this rank ends with ``error``."""
        self.record_exit(error.exit_code, str(error), error.blames)

    def mark_done(self) -> None:
        """Mark, on rank 0, that the run is finished and complete on disk.

        The mark counts more than any exit code that a launcher reports later.
        """
        self._mark("DONE")

    def mark_stopped(self) -> None:
        """Mark, on rank 0, that the run stopped as requested and its checkpoint is on disk."""
        self._mark("STOPPED")

    def _mark(self, name: str) -> None:
        if self.folder is not None and self.rank == 0:
            (self.folder / name).touch()


def attempt_of(folder: Path) -> int | None:
    """Return N for a folder named attempt-N, and None for any other name."""
    match = re.fullmatch(r"attempt-([0-9]+)", folder.name)
    return None if match is None else int(match[1])


def _read_heartbeat(path: Path) -> dict[str, Any]:
    """Return the supervisor's heartbeat; {} if the file is missing or has other content."""
    heartbeat = read_json(path)
    attempt = heartbeat.get("attempt")
    patience_s = heartbeat.get("patience_s", PATIENCE_S)
    is_heartbeat = isinstance(attempt, int) and isinstance(patience_s, int | float)
    return heartbeat if is_heartbeat else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` atomically. An OSError (a full or lost disk) is ignored."""
    try:
        replace_file(path, json.dumps(value), durable=False)
    except OSError:
        return


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``; {} if there is none or it cannot be parsed."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
