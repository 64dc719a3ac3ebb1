"""The processes that started this rank.

When its launcher is gone, nobody waits for the rank, and nobody passes a signal on to it. Whatever
ended the launcher, a process that loses its parent gets another one: init, or a subreaper.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from prelora_ds.errors import ORPHAN_EXIT_CODE

# What starts ranks, by the name of its program or module.
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
    """The line from this process up to its outermost launcher, as it was when this was made.

    The line holds the parent and each known launcher above it: on one host, the process that starts
    the ranks is itself started by `deepspeed`.

    A shell is not a launcher, because a job in its background may outlive it. Neither is an unknown
    program that gave this process a session of its own. The line ends at an interactive shell.
    """

    def __init__(self) -> None:
        self._line = _line(os.getppid())

    def check(self) -> tuple[int, str] | None:
        """For `Guard.watch`: 87 when a process of the line is gone."""
        parent: int | None = os.getppid()
        for pid, name in self._line:
            if parent is None:
                return None  # /proc did not tell
            if parent != pid:
                return ORPHAN_EXIT_CODE, f"the launcher is gone: process {pid} ({name}) has ended"
            parent = _parent_of(pid)
        return None


def find_launcher() -> int | None:
    """The process id of the launcher that started this process on this host; None where none is known."""
    return next((pid for pid, name in _line(os.getppid()) if name in LAUNCHERS), None)


def _line(pid: int) -> Sequence[tuple[int, str]]:
    """Process ids and names from ``pid`` upwards, as far as the outermost launcher."""
    line, known = list[tuple[int, str]](), 0
    parent: int | None = pid
    while parent is not None and parent > 1:  # 0: in another PID namespace
        words = _words(parent)
        name = _name(words)
        if name in SHELLS and (len(words) == 1 or words[0].startswith("-")):
            break  # interactive
        line.append((parent, name))
        if name in LAUNCHERS or (parent == pid and name not in SHELLS and _same_session(pid)):
            known = len(line)
        parent = _parent_of(parent)
    return line[:known]


def _same_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == os.getsid(0)
    except OSError:
        return False


def _words(pid: int) -> Sequence[str]:
    """The command line of a process; one word, its number, where it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        text = ""
    return [word for word in text.split("\0") if word] or [str(pid)]


def _name(words: Sequence[str]) -> str:
    """The program; where that is Python, its script, or its module after -m.

    A daemon may add to its name: ``slurmstepd: [7.0]``.
    """
    program = os.path.basename(words[0].split(":")[0]).removeprefix("-")
    if not program.startswith("python"):
        return program
    following = iter(words[1:])
    for word in following:
        if word == "-m":
            return next(following, program)
        if word in ("-W", "-X"):
            next(following, None)
        elif not word.startswith("-"):
            return os.path.basename(word)
    return program


def _parent_of(pid: int) -> int | None:
    """None where it cannot be told, or the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
