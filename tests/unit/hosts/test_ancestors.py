"""The processes that started a rank, with real processes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Prints the verdict on its launcher, and prints it again once the file GO exists.
RANK = """
import os, sys, time
from prelora_ds.hosts.ancestors import Ancestors
ancestors = Ancestors()
print(os.getpid(), ancestors.check(), flush=True)
while not os.path.exists(sys.argv[1]): time.sleep(0.02)
print(ancestors.check(), flush=True)
"""
# Starts the rank as its child and waits for it; the name of the file is the name of the launcher.
STARTER = """
import subprocess, sys
own_session = sys.argv[1] == "own session"
subprocess.Popen([sys.executable, sys.argv[2], sys.argv[3]], start_new_session=own_session).wait()
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    (tmp_path / "rank.py").write_text(RANK)
    for name in ("starter.py", "torchrun"):
        (tmp_path / name).write_text(STARTER)
    return tmp_path


def verdict_after_a_kill(folder: Path, command: list[str], victim: int | None = None) -> str:
    """Return the verdict of a rank that ``command`` started, after a SIGKILL.

    The killed process is the one that was started, or the rank's ``victim``-th ancestor.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid, verdict = process.stdout.readline().split(maxsplit=1)
    assert verdict == "None\n"
    target = int(pid)
    for _ in range(victim or 0):
        target = int(Path(f"/proc/{target}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(process.pid if victim is None else target, signal.SIGKILL)
    time.sleep(0.2)
    (folder / "GO").touch()
    said = process.stdout.readline()
    process.kill()
    process.wait(10)
    return said


def script(folder: Path, name: str, session: str = "same session") -> list[str]:
    return [
        sys.executable,
        str(folder / name),
        session,
        str(folder / "rank.py"),
        str(folder / "GO"),
    ]


def test_a_program_that_started_the_rank_is_its_launcher(scripts: Path) -> None:
    said = verdict_after_a_kill(scripts, script(scripts, "starter.py"))
    assert said.startswith("(87, 'the launcher is gone: process") and "(starter.py)" in said


def test_a_rank_with_its_own_session_may_outlive_an_unknown_program(
    scripts: Path,
) -> None:
    assert verdict_after_a_kill(scripts, script(scripts, "starter.py", "own session")) == "None\n"


def test_a_known_launcher_counts_in_another_session_too_as_with_torchrun(
    scripts: Path,
) -> None:
    assert "(torchrun)" in verdict_after_a_kill(scripts, script(scripts, "torchrun", "own session"))


def test_a_shell_with_the_rank_in_its_background_is_not_a_launcher(scripts: Path) -> None:
    command = ["bash", "-c", f"{sys.executable} {scripts}/rank.py {scripts}/GO & wait"]
    assert verdict_after_a_kill(scripts, command) == "None\n"


def test_an_outer_launcher_and_a_script_between_launchers_count(scripts: Path) -> None:
    """For example, srun starts a script that starts `deepspeed`."""
    inner = shlex.join(script(scripts, "torchrun"))
    outer = scripts / "srun"
    outer.write_text(
        "import subprocess, sys\nsubprocess.Popen(['bash', '-c', sys.argv[1] + '; exit']).wait()"
    )
    assert "(srun)" in verdict_after_a_kill(scripts, [sys.executable, str(outer), inner])
    (scripts / "GO").unlink()
    assert "(bash)" in verdict_after_a_kill(scripts, [sys.executable, str(outer), inner], victim=2)


def test_a_subreaper_that_adopts_the_orphan_is_not_its_launcher(scripts: Path) -> None:
    reaper = scripts / "reaper"
    reaper.write_text(
        "import ctypes, subprocess, sys\nctypes.CDLL(None).prctl(36, 1)\n"  # PR_SET_CHILD_SUBREAPER
        "subprocess.Popen(sys.argv[1:]).wait()\nimport time; time.sleep(60)"
    )
    said = verdict_after_a_kill(
        scripts, [sys.executable, str(reaper), *script(scripts, "torchrun")], victim=1
    )
    assert "(torchrun)" in said
