"""The processes that started this rank.

When its launcher is gone, no process waits for the rank or forwards signals to it. However the
launcher ended, a process that loses its parent gets another one: init, or a subreaper.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from prelora_ds.errors import ORPHAN_EXIT_CODE

# Names of the programs and modules that start ranks.
LAUNCHERS = frozenset(
    (
        "deepspeed",
        "deepspeed.launcher.runner",
        "deepspeed.launcher.launch",
        "prelora",
        "prelora_ds.cli",
        "torchrun",
        "torch.distributed.run",
        "torch.distributed.launch",
        "accelerate",
        "srun",
        "slurmstepd",
        "mpirun",
        "mpiexec",
        "mpiexec.hydra",
        "orterun",
        "prterun",
        "prte",
        "orted",
        "prted",
        "hydra_pmi_proxy",
        "hydra_bstrap_proxy",
        "pmi_proxy",
        "palsd",
    )
)
SHELLS = frozenset(("sh", "bash", "dash", "ash", "zsh", "ksh", "csh", "tcsh", "fish", "busybox"))


class Ancestors:
    """The processes from the parent up to the outermost launcher, when this object was created.

    They are the parent and every process up to the last known launcher: on one host, the process
    that starts the ranks is itself started by `deepspeed`.

    A shell is not a launcher, because a job in its background may outlive it. Neither is an unknown
    program that gave this process a session of its own. The chain ends at an interactive shell.
    """

    def __init__(self) -> None:
        self._chain = _chain(os.getppid())

    def check(self) -> tuple[int, str] | None:
        """Return the exit code 87 and a reason when a process of the chain is gone.

        The guard calls this method.
        """
        parent: int | None = os.getppid()
        for pid, name in self._chain:
            if parent is None:
                return None  # unknown: /proc could not be read
            if parent != pid:
                return ORPHAN_EXIT_CODE, f"the launcher is gone: process {pid} ({name}) has ended"
            parent = _parent_of(pid)
        return None


def find_launcher() -> int | None:
    """Return the process id of the launcher that started this process; None if unknown."""
    return next((pid for pid, name in _chain(os.getppid()) if name in LAUNCHERS), None)


def _chain(pid: int) -> Sequence[tuple[int, str]]:
    """Return process ids and names from ``pid`` up to the outermost launcher."""
    chain: list[tuple[int, str]] = []
    length = 0  # up to the last launcher so far
    parent: int | None = pid
    while parent is not None and parent > 1:  # 0: the parent is in another PID namespace
        command = _command_line(parent)
        name = _name(command)
        if name in SHELLS and (len(command) == 1 or command[0].startswith("-")):
            break  # an interactive shell
        chain.append((parent, name))
        started_this = parent == pid and name not in SHELLS and _same_session(pid)
        if name in LAUNCHERS or started_this:
            length = len(chain)
        parent = _parent_of(parent)
    return chain[:length]


def _same_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == os.getsid(0)
    except OSError:
        return False


def _command_line(pid: int) -> Sequence[str]:
    """Return the words of a command line; only the process id if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        text = ""
    return [word for word in text.split("\0") if word] or [str(pid)]


def _name(command: Sequence[str]) -> str:
    """Return the name of the program; for Python that of the script, or of the module after -m.

    A daemon may extend its name: ``slurmstepd: [7.0]``.
    """
    program = os.path.basename(command[0].split(":")[0]).removeprefix("-")
    if not program.startswith("python"):
        return program
    following = iter(command[1:])
    for word in following:
        if word == "-m":
            return next(following, program)
        if word in ("-W", "-X"):
            next(following, None)
        elif not word.startswith("-"):
            return os.path.basename(word)
    return program


def _parent_of(pid: int) -> int | None:
    """Return the parent's process id; None if unknown or the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
