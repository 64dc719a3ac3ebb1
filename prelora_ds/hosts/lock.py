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

from prelora_ds.errors import FENCED_EXIT_CODE, LaunchError
from prelora_ds.files import replace_file
from prelora_ds.hosts.heartbeat import read_json

RENEWED_EVERY_S = 5.0
DEAD_AFTER_S = 30.0  # without a change


class Lock:
    """The file ``path``, held by rank 0's process from `take` to `release`; the guard watches its `check`.

    A lock that another job has taken over means that this one was given up for dead.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._token, self._ended = path, uuid.uuid4().hex, threading.Event()
        self._missed = False

    def take(self) -> Lock:
        """Raises LaunchError when a living job holds the folder; waits up to half a minute to see whether it lives."""
        while True:
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._wait_for_its_end()
                continue
            os.write(descriptor, self._text(0).encode())
            os.close(descriptor)
            self._folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
            self._thread.start()
            return self

    def release(self) -> None:
        """Give the folder back.

        A disk that takes no changes any more keeps the file. That must not hide why the run ends,
        and it does no harm: a dead process holds nothing.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(RENEWED_EVERY_S)  # not for ever: its disk may stall
        with contextlib.suppress(OSError):
            os.close(self._folder)
            if read_json(self.path).get("token") == self._token:
                self.path.unlink(missing_ok=True)

    def check(self) -> tuple[int, str] | None:
        """For `Guard.watch`: 88 when another job holds the folder, 75 when it was removed or moved.

        The folder has to be missing twice in a row.
        """
        if self._ended.is_set():
            return None
        lost, missed_before = self.lost(), self._missed
        self._missed = lost is not None
        if lost is not None and missed_before:
            return lost.exit_code, str(lost)
        held = read_json(self.path)
        if held.get("token", self._token) == self._token:
            return None
        return FENCED_EXIT_CODE, f"{self.path} was taken over by {_holder(held)}"

    def lost(self) -> LaunchError | None:
        """The error where the path does not lead to the folder any more that was taken."""
        try:
            if os.path.samestat(os.stat(self.path.parent), os.fstat(self._folder)):
                return None
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:
            return None  # the disk does not tell
        return LaunchError(f"{self.path.parent} was removed or moved while this job was writing to it\n"
                           "  remedy: put it back, and start the same command again")

    def _text(self, renewals: int) -> str:
        pid = os.getpid()
        return json.dumps({"token": self._token, "host": socket.gethostname(), "pid": pid, "born": _born(pid),
                           "boot": _boot_id(), "processes": _pid_namespace(), "renewals": renewals})

    def _renew(self) -> None:
        renewals = 0
        while not self._ended.wait(RENEWED_EVERY_S):
            renewals += 1
            # Not into another folder that has its path now. A full disk ends no training.
            with contextlib.suppress(OSError):
                held = read_json(self.path)
                if self.lost() is None and held.get("token", self._token) == self._token:
                    replace_file(self.path, self._text(renewals), durable=False)

    def _wait_for_its_end(self) -> None:
        first, begun = read_json(self.path), time.monotonic()
        if first and not _surely_dead(first):
            here = _is_of_this_machine(first)
            while not here and time.monotonic() - begun < DEAD_AFTER_S and read_json(self.path) == first:
                time.sleep(0.5)
            if here or read_json(self.path) not in (first, {}):
                raise LaunchError(f"{self.path.parent} is in use by {_holder(first)}\n"
                                  "  remedy: end that job, or choose another run.output_dir")
        # Whoever moves it away may create the next one; what was moved must be what was judged.
        moved = self.path.with_name(f"{self.path.name}.{self._token}.dead")
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
    return _is_of_this_machine(held) and _born(held["pid"]) != held["born"]


def _is_of_this_machine(held: dict[str, Any]) -> bool:
    """Whether this machine can tell if the holder lives: not of a file that names no process, and not from inside a
    container of one outside."""
    return (held.get("host") == socket.gethostname() and held.get("boot") == _boot_id()
            and held.get("processes") == _pid_namespace()
            and isinstance(held.get("pid"), int) and isinstance(held.get("born"), str))


def _holder(held: dict[str, Any]) -> str:
    return f"process {held.get('pid', '?')} on {held.get('host', 'an unknown host')}"


def _born(pid: int) -> str | None:
    """When a process began, in clock ticks since boot: a number may be given to another process later."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _pid_namespace() -> str:
    """What numbers of processes mean here: in a container they are others."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
