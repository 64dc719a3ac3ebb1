"""A lock file that allows one job per output folder; the holder rewrites it every 5 s.

It works where file locks do not (shared file systems, several hosts). A waiting process checks by
its own clock whether the file changes, so the clocks of hosts are never compared.
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
DEAD_AFTER_S = 30.0  # a lock file that does not change for this long belongs to a dead job


class Lock:
    """The lock file ``path``, held by one process from `take` to `release`.

    The guard calls `check`. If another job has taken over the lock, it considered this one dead.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = uuid.uuid4().hex
        self._released = threading.Event()
        self._was_lost = False

    def take(self) -> Lock:
        """Take the lock, and start the thread that renews it.

        Waits up to DEAD_AFTER_S seconds to find out whether the holder lives. Raises LaunchError if
        it does.
        """
        while True:
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._remove_dead_lock()
                continue
            os.write(descriptor, self._text(0).encode())
            os.close(descriptor)
            self._folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
            self._thread.start()
            return self

    def release(self) -> None:
        """Release the folder.

        If the disk no longer accepts changes, the file remains. This error is ignored, because it
        would hide why the run ends, and the lock of a dead process does no harm.
        """
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join(RENEWED_EVERY_S)  # with a limit: its disk may stall
        with contextlib.suppress(OSError):
            os.close(self._folder)
            if read_json(self.path).get("token") == self._token:
                self.path.unlink(missing_ok=True)

    def check(self) -> tuple[int, str] | None:
        """Return an exit code and a reason when the lock is lost; the guard calls this method.

        The code is 88 when another job holds the folder, and 75 when the folder was removed or
        moved, in two checks in a row.
        """
        if self._released.is_set():
            return None
        was_lost = self._was_lost
        lost = self.lost()
        self._was_lost = lost is not None
        if lost is not None and was_lost:
            return lost.exit_code, str(lost)
        held = read_json(self.path)
        if held.get("token", self._token) == self._token:
            return None
        return FENCED_EXIT_CODE, f"{self.path} was taken over by {_holder(held)}"

    def lost(self) -> LaunchError | None:
        """Return an error if the path no longer leads to the folder that was locked."""
        try:
            if os.path.samestat(os.stat(self.path.parent), os.fstat(self._folder)):
                return None
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:
            return None  # unknown: the disk does not respond
        return LaunchError(f"{self.path.parent} was removed or moved while this job was writing "
                           "to it\n"
                           "  remedy: restore it, and run the same command again")

    def _text(self, renewals: int) -> str:
        pid = os.getpid()
        return json.dumps({"token": self._token,
                           "host": socket.gethostname(),
                           "pid": pid,
                           "born": _start_time(pid),
                           "boot": _boot_id(),
                           "processes": _pid_namespace(),
                           "renewals": renewals})

    def _renew(self) -> None:
        renewals = 0
        while not self._released.wait(RENEWED_EVERY_S):
            renewals += 1
            # Do not write into another folder that now has this path. Ignore a full disk.
            with contextlib.suppress(OSError):
                held = read_json(self.path)
                if self.lost() is None and held.get("token", self._token) == self._token:
                    replace_file(self.path, self._text(renewals), durable=False)

    def _remove_dead_lock(self) -> None:
        """Remove the lock of a dead job. Raises LaunchError if the holder lives."""
        begun = time.monotonic()
        first = read_json(self.path)
        if first and not is_dead(first):
            here = _is_of_this_machine(first)
            while not here and time.monotonic() - begun < DEAD_AFTER_S:
                if read_json(self.path) != first:
                    break
                time.sleep(0.5)
            if here or read_json(self.path) not in (first, {}):
                raise LaunchError(f"{self.path.parent} is in use by {_holder(first)}\n"
                                  "  remedy: end that job, or choose another run.output_dir")

        # Rename first, then check that the renamed file is the one found dead above: another
        # process may have replaced it.
        moved = self.path.with_name(f"{self.path.name}.{self._token}.dead")
        try:
            self.path.rename(moved)
        except FileNotFoundError:
            return
        if read_json(moved) not in (first, {}):
            with contextlib.suppress(FileExistsError):
                os.link(moved, self.path)  # it was a new lock: restore it
        moved.unlink(missing_ok=True)


def is_dead(held: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    return _is_of_this_machine(held) and _start_time(held["pid"]) != held["born"]


def _is_of_this_machine(held: dict[str, Any]) -> bool:
    """Whether this machine can determine if the holder lives.

    It cannot if the file names no process, or if the holder is in another PID namespace, for
    example outside of this container.
    """
    return (held.get("host") == socket.gethostname()
            and held.get("boot") == _boot_id()
            and held.get("processes") == _pid_namespace()
            and isinstance(held.get("pid"), int)
            and isinstance(held.get("born"), str))


def _holder(held: dict[str, Any]) -> str:
    return f"process {held.get('pid', '?')} on {held.get('host', 'an unknown host')}"


def _start_time(pid: int) -> str | None:
    """Return the start time of a process, in clock ticks since boot; None if it has ended.

    The start time distinguishes processes that have the same number one after the other.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _pid_namespace() -> str:
    """Return the PID namespace, in which process numbers are valid; containers have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
