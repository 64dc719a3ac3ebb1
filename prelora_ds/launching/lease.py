"""One job at a time in an output folder: a file that names the job and is renewed while it lives.

Works where file locks do not (a shared file system, other hosts): what counts is whether the file changes while one
looks, by one's own clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from prelora_ds.core.errors import FENCED_EXIT_CODE, LaunchError
from prelora_ds.launching.files import replace_text
from prelora_ds.launching.supervised import read_json

NAME = ".lease"
RENEWED_EVERY_S = 5.0
DEAD_AFTER_S = 30.0  # without a change


class Lease:
    """Held by rank 0's process from `take` to `release`. Its `check` is for the guard: a lease that another job has
    taken over means that this one was given up for dead."""

    def __init__(self, folder: Path) -> None:
        self.path, self._token, self._ended = folder / NAME, uuid.uuid4().hex, threading.Event()

    def take(self) -> Lease:
        """Raises LaunchError when a living job holds the folder; waits up to half a minute to see whether it lives."""
        while True:
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._wait_for_its_end()
                continue
            os.write(descriptor, self._text(0).encode())
            os.close(descriptor)
            self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
            self._thread.start()
            return self

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        if read_json(self.path).get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def check(self) -> tuple[int, str] | None:
        """For `Guard.checks`."""
        held = read_json(self.path)
        if held.get("token", self._token) == self._token:
            return None
        return FENCED_EXIT_CODE, f"error: {self.path} was taken over by process {held['pid']} on {held['host']}"

    def _text(self, renewals: int) -> str:
        pid = os.getpid()
        return json.dumps({"token": self._token, "host": socket.gethostname(), "pid": pid, "born": _born(pid),
                           "boot": _boot_id(), "renewals": renewals})

    def _renew(self) -> None:
        renewals = 0
        while not self._ended.wait(RENEWED_EVERY_S):
            renewals += 1
            try:
                if read_json(self.path).get("token", self._token) == self._token:
                    replace_text(self.path, self._text(renewals))
            except OSError:  # a full disk ends no training
                continue

    def _wait_for_its_end(self) -> None:
        first, begun = read_json(self.path), time.monotonic()
        if first and not _surely_dead(first):
            here = (first.get("host"), first.get("boot")) == (socket.gethostname(), _boot_id())
            while not here and time.monotonic() - begun < DEAD_AFTER_S and read_json(self.path) == first:
                time.sleep(0.5)
            if here or read_json(self.path) not in (first, {}):
                raise LaunchError(f"{self.path.parent} is in use by process {first.get('pid')} on {first.get('host')}\n"
                                  "  remedy: end that job, or choose another run.output_dir")
        # Whoever moves it away may create the next one; what was moved must be what was judged.
        moved = self.path.with_name(f"{NAME}.{self._token}.dead")
        try:
            self.path.rename(moved)
        except FileNotFoundError:
            return
        if read_json(moved) not in (first, {}):
            with contextlib.suppress(FileExistsError):
                os.link(moved, self.path)  # it was another's, and new
        moved.unlink(missing_ok=True)


def _surely_dead(held: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine and is no more."""
    if held.get("host") != socket.gethostname() or held.get("boot") != _boot_id():
        return False
    return _born(held.get("pid", -1)) != held.get("born")


def _born(pid: int) -> str | None:
    """When a process began, in clock ticks since boot: a number may be given to another process later."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
