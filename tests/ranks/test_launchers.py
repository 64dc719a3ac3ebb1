"""Launchers that end while their ranks train: a checkpoint is left, but no rank or worker process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from support.launch import ROOT, launch_command
from support.launches import DEBUG, Job
from support.pool import free_port

from prelora_ds.run.checkpoints.checkpoint_folder import CheckpointManifest, list_checkpoints

LONG = ("train.duration=9000 steps", "checkpoint.every=null")
ENDED_S = 10.0  # measured; the tests allow twice as long for a busy machine


def torchrun(*arguments):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
        "launch/pretrain.py",
        *arguments,
    ]


def mpirun(*arguments):
    return [
        "mpirun",
        "--allow-run-as-root",
        "--oversubscribe",
        "--bind-to",
        "none",
        "-n",
        "2",
        "-x",
        f"MASTER_PORT={free_port()}",
        sys.executable,
        "launch/pretrain.py",
        *arguments,
    ]


def shell(*arguments):
    """Return a command with a script between the launcher and each rank."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--no-python",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
        "bash",
        "-c",
        f'{sys.executable} launch/pretrain.py "$@"; exit $?',
        "rank",
        *arguments,
    ]


def supervised(*arguments):
    out = next(word.partition("=")[2] for word in arguments if word.startswith("run.output_dir="))
    hosts = Path(f"{out}.hosts")
    hosts.write_text("localhost slots=2\n")
    supervise = ["supervise", "--hostfile", str(hosts), "--nodes", "1", "--probe", "", "--"]
    return [sys.executable, "-m", "prelora_ds.cli", *supervise, *torchrun(*arguments)]


def deepspeed(*arguments):
    return launch_command(*arguments)[0]


class Launch:
    """A launcher with its descendants, which all inherit one variable."""

    def __init__(self, start, out: Path, shards: Path, *settings: str) -> None:
        self.out, self.log, self._mark = out, out.with_suffix(".log"), f"LAUNCHED_AS={uuid.uuid4()}"
        command = start(
            "--recipe",
            DEBUG,
            "--deepspeed_config",
            "ds_configs/zero2.json",
            f"run.output_dir={out}",
            f"data.train={shards / 'train'}",
            f"data.val={shards / 'val'}",
            *LONG,
            *settings,
        )
        key, value = self._mark.split("=")
        environ = launch_command()[1] | {key: value, "GLOO_SOCKET_IFNAME": "lo"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,
            )

    def pids(self, *words: str) -> list[int]:
        """Return the running processes of this launch whose command line contains all ``words``."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if (
                    entry.name.isdigit()
                    and self._mark in (entry / "environ").read_text(errors="replace").split("\0")
                    and all(
                        word in (entry / "cmdline").read_text(errors="replace") for word in words
                    )
                ):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def wait_for(self, what, seconds: float = 120.0) -> float:
        """Wait until ``what()`` is true; return the seconds that it took."""
        begun = time.monotonic()
        while not what():
            assert time.monotonic() - begun < seconds, self.log.read_text(errors="replace")[-3000:]
            time.sleep(0.05)
        return time.monotonic() - begun

    def trains(self) -> None:
        self.wait_for(
            lambda: (
                (self.out / "metrics.jsonl").is_file()
                and (self.out / "metrics.jsonl").stat().st_size
            )
        )

    def is_over(self) -> bool:
        self.process.poll()  # a zombie has no environment, but the launcher is this process's child
        return not self.pids()

    def close(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture
def launched(tmp_path, shards):
    started: list[Launch] = []

    def begin(start, *settings):
        started.append(Launch(start, tmp_path / "out", shards, *settings))
        return started[-1]

    yield begin
    for launch in started:
        launch.close()


@pytest.mark.parametrize(
    ("start", "number", "victim", "settings"),
    [
        (deepspeed, signal.SIGTERM, None, ()),
        (deepspeed, signal.SIGINT, None, ("train.eval_every=1 steps",)),
        (deepspeed, signal.SIGKILL, "deepspeed.launcher.launch", ("checkpoint.every=1 steps",)),
        (torchrun, signal.SIGKILL, None, ()),
        (shell, signal.SIGKILL, None, ()),
        (mpirun, signal.SIGKILL, None, ()),
        (supervised, signal.SIGKILL, None, ()),
    ],
    ids=[
        "deepspeed-TERM",
        "deepspeed-INT-evaluating",
        "launch.py-KILL-saving",
        "torchrun-KILL",
        "torchrun-bash-KILL",
        "mpirun-KILL",
        "supervise-KILL",
    ],
)
def test_ranks_whose_launcher_is_ended_stop_with_a_checkpoint(
    launched, start, number, victim, settings
):
    launch = launched(start, *settings)
    launch.trains()
    os.kill(launch.process.pid if victim is None else min(launch.pids(victim)), number)
    launch.wait_for(launch.is_over, 2 * ENDED_S)
    newest = list_checkpoints(launch.out / "checkpoints")[0]
    CheckpointManifest.load(newest).verify(newest)
    if start is not mpirun:  # which forwards the output of the ranks
        own_log = Path(f"{launch.out}.supervise/attempt-1/launcher.log")
        said = (own_log if own_log.exists() else launch.log).read_text(errors="replace")
        assert "the launcher is gone" in said, said[-3000:]


def test_before_the_first_step_ranks_whose_launcher_is_ended_end_at_once(launched):
    launch = launched(deepspeed)
    launch.wait_for(lambda: len(launch.pids("pretrain.py", "--local_rank")) == 2)
    time.sleep(0.3)  # until Python has started
    os.kill(launch.process.pid, signal.SIGHUP)
    launch.wait_for(launch.is_over, 2 * ENDED_S)
    assert "the launcher is gone" in launch.log.read_text(errors="replace")
    assert not (launch.out / "metrics.jsonl").exists()


def test_no_process_is_left_of_ranks_that_are_killed(launched):
    """The workers of their loaders, and the fork servers of these, end on their own."""
    launch = launched(deepspeed, "data.workers=2")
    launch.trains()
    for pid in launch.pids("pretrain.py"):
        os.kill(pid, signal.SIGKILL)
    launch.wait_for(launch.is_over, 2 * ENDED_S)


def test_ranks_learn_within_seconds_that_rank_0_was_refused(forge, shards, tmp_path):
    """No launcher ends them, as under srun without --kill-on-bad-exit."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "of-somebody-else").touch()
    job = Job(forge, tmp_path / "out", shards)
    assert forge.wait(job.pids, 30), job.said()[-3000:]
    assert [forge.ended[pid] for pid in job.pids] == [2, 2]
    assert job.said().count("exists and is not empty") == 1


def test_an_output_folder_that_is_removed_ends_the_run_with_75_and_one_message(
    forge, shards, tmp_path
):
    job = Job(forge, tmp_path / "out", shards, *LONG, "checkpoint.every=50 steps")
    job.wait_for(tmp_path / "out" / "metrics.jsonl")
    while (tmp_path / "out").exists():  # the run may write a file in between
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert forge.wait(job.pids[:1], 30), job.said()[-3000:]
    assert forge.ended[job.pids[0]] == 75, job.said()[-3000:]
    job.end()
    assert job.said().count("was removed or moved") == 1
    assert "failed\nTraceback" not in job.said()
