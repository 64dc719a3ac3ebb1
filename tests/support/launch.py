"""Start launch/pretrain.py like a user."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil

from support.pool import free_port

ROOT = Path(__file__).parents[2]


def launch(*arguments, runner="deepspeed.launcher.runner", ranks=2, timeout=200, script="launch/pretrain.py"):
    """Run launch/pretrain.py, or another ``script``, under DeepSpeed's launcher, and return the completed process.

    The runner ``deepspeed.launcher.launch`` omits the first stage of the launcher.
    """
    command, environ = launch_command(*arguments, runner=runner, ranks=ranks, script=script)
    return subprocess.run(
        command, cwd=ROOT, timeout=timeout, text=True, capture_output=True, env=environ
    )


def launch_command(*arguments, runner="deepspeed.launcher.runner", ranks=2, script="launch/pretrain.py"):
    """Return the command and the environment of `launch`."""
    if runner == "deepspeed.launcher.runner":
        options = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    else:
        # {"localhost": [0, 1]} in base64, as the first stage passes it to the second.
        world = {1: "eyJsb2NhbGhvc3QiOiBbMF19", 2: "eyJsb2NhbGhvc3QiOiBbMCwgMV19"}[ranks]
        options = [
            f"--world_info={world}",
            "--master_addr=127.0.0.1",
            f"--master_port={free_port()}",
        ]
    command = [sys.executable, "-m", runner, *options, str(script), *map(str, arguments)]
    return command, os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }


def kill_tree(run):
    """Kill the process ``run``, and then all that it has started, so that it starts no other meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
