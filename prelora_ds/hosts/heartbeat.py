"""A rank's side of `prelora supervise`: it watches the supervisor's lease, and leaves a record of how it ended.

Files, in a folder that all hosts share:  .lease  lease.json  attempt-N/{rank-R.json, exit-R.json, DONE, STOPPED}
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prelora_ds.errors import FENCED_EXIT_CODE, ORPHAN_EXIT_CODE, ConfigError, ExpectedError
from prelora_ds.files import replace_file

LEASE = "lease.json"
LOCK = ".lease"  # of the one supervisor that may renew it
ASLEEP_S = 10.0
JUST_AWAKE_S = 60.0  # an end that follows a sleep so soon may come of it


class Supervision:
    """Of one rank in one attempt. ``folder`` is DIR/attempt-N; None where nobody supervises, and nothing happens.

    rank: None while it is not known yet. Raises ConfigError when ``folder`` has another name.
    """

    def __init__(self, folder: Path | None, rank: int | None = None) -> None:
        self.folder, self.rank = folder, rank
        self._seen: dict[str, Any] = {}
        self._changed_at, self._stopping = time.monotonic(), False
        self._looked_at: float | None = None  # by `check`, which begins when a rank has imported all it wants
        self._slept_s, self._woke_at = 0.0, 0.0
        if folder is not None:
            self.attempt = attempt_of(folder)
            if self.attempt is None:
                raise ConfigError("--supervised", str(folder),
                                  "is not a folder that `prelora supervise` made",
                                  "leave it out: the supervisor sets it itself")
            if rank is not None:
                write_json(folder / f"rank-{rank}.json", {"rank": rank, "host": socket.gethostname(),
                                                          "pid": os.getpid()})

    def check(self) -> tuple[int, str] | None:
        """For `Guard.watch`: 88 when a newer attempt runs, 87 when the lease did not change.

        The lease itself says for how many seconds it may stay the same. Time is this process's
        own, so clocks that differ do no harm. A lease that cannot be read, or is not one, has not
        changed.
        """
        if self.folder is None or self.attempt is None:
            return None
        now = time.monotonic()
        # This thread looks every few seconds, unless the whole process is stopped.
        if self._looked_at is not None and now - self._looked_at > ASLEEP_S:
            self._slept_s, self._woke_at = now - self._looked_at, now
        lease = _lease(self.folder.parent / LEASE)
        # While a shared disk stalls, neither does this process sleep nor is the supervisor silent.
        self._looked_at = time.monotonic()
        self._changed_at += self._looked_at - now
        if lease.get("attempt", self.attempt) > self.attempt:
            return FENCED_EXIT_CODE, (f"attempt {lease['attempt']} runs, and this rank belongs to "
                                      f"attempt {self.attempt}")
        if lease and lease != self._seen:
            self._seen, self._changed_at = lease, self._looked_at
        silent_s, patience_s = self._looked_at - self._changed_at, float(self._seen.get("patience_s", 60.0))
        if silent_s > patience_s:
            return ORPHAN_EXIT_CODE, ("the supervisor is gone: its lease has not changed for "
                                      f"{silent_s:.0f} s")
        if lease.get("stop") and not self._stopping:
            self._stopping = True
            os.kill(os.getpid(), signal.SIGUSR1)  # as a batch system warns: checkpoint, then 99
        return None

    def ended(self, code: int, why: str, blames: Sequence[int] = ()) -> None:
        """Leave the record of an end that is no success. ``blames``: the ranks that failed, if not this one."""
        if self.folder is None:
            return
        name = f"{socket.gethostname()}.{os.getpid()}" if self.rank is None else self.rank
        slept_s = self._slept_s if time.monotonic() - self._woke_at < JUST_AWAKE_S else 0.0
        write_json(self.folder / f"exit-{name}.json",
                   {"rank": self.rank, "host": socket.gethostname(), "code": code, "slept_s": slept_s,
                    "blames": list(blames), "why": f"was stopped for {slept_s:.0f} s; then: {why}" if slept_s else why})

    def failed(self, error: ExpectedError) -> None:
        """As `ended`."""
        self.ended(error.exit_code, str(error), error.blames)

    def mark(self, name: str) -> None:
        """DONE or STOPPED, by rank 0: the run is whole on disk, whatever exit codes say after it."""
        if self.folder is not None and self.rank == 0:
            (self.folder / name).touch()


def attempt_of(folder: Path) -> int | None:
    """N of a folder named attempt-N, None of any other."""
    match = re.fullmatch(r"attempt-([0-9]+)", folder.name)
    return None if match is None else int(match[1])


def _lease(path: Path) -> dict[str, Any]:
    """The supervisor's lease; {} where there is none, or something else has its name."""
    lease = read_json(path)
    attempt, patience_s = lease.get("attempt"), lease.get("patience_s", 60.0)
    return lease if isinstance(attempt, int) and isinstance(patience_s, int | float) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all; a full or lost disk is no reason to fail."""
    try:
        replace_file(path, json.dumps(value), durable=False)
    except OSError:
        return


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; {} while there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
