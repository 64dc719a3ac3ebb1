"""Logs and standard streams may fail without ending a run.

A checkpoint or an export that cannot be written ends it with 75 and one message.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from support.launch import ROOT, launch_command
from support.launches import DEBUG, Job

from prelora_ds.data.shards.writer import digits, write_shards
from prelora_ds.run.checkpoints.checkpoint_folder import CheckpointManifest
from prelora_ds.run.log import read_lines

LAST = "checkpoints/step-00000020"
SHORT = ("train.duration=4 steps", "train.eval_every=4 steps", "convergence=null")


@pytest.fixture
def job(forge, shards):
    return lambda out, *arguments, **how: Job(forge, out, shards, *arguments, **how)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def finished(forge, shards, tmp_path_factory):
    """A run of all phases on 2 ranks, and its output."""
    out = tmp_path_factory.mktemp("finished") / "out"
    job = Job(forge, out, shards)
    assert job.end() == [0, 0], job.said()[-3000:]
    return out, job.said()


def fill(folder: Path) -> Path:
    with (
        (folder / "filler").open("wb", buffering=0) as filler,
        pytest.raises(OSError, match="No space left"),
    ):
        while True:
            filler.write(bytes(4096))
    return folder / "filler"


# ---- what may fail


def test_standard_streams_on_a_full_disk_end_no_run(job, finished, small_disk, tmp_path):
    fill(small_disk)
    ended = job(tmp_path / "out", log=str(small_disk / "log"))
    assert ended.end() == [0, 0] and ended.said() == ""
    assert (tmp_path / "out/model/model.safetensors").read_bytes() == (
        finished[0] / "model/model.safetensors"
    ).read_bytes()


def test_standard_streams_that_are_closed_end_no_run(shards, tmp_path):
    """Without them, the next file that a program opens gets their descriptor."""
    command, environ = launch_command(
        "--recipe",
        DEBUG,
        "--deepspeed_config",
        "ds_configs/zero2.json",
        f"run.output_dir={tmp_path / 'out'}",
        f"data.train={shards / 'train'}",
        f"data.val={shards / 'val'}",
        *SHORT,
        runner="deepspeed.launcher.launch",
        ranks=1,
    )
    closed = ["bash", "-c", '"$@" >&- 2>&-', "bash", *command]
    assert subprocess.run(closed, cwd=ROOT, env=environ, timeout=200, check=False).returncode == 0
    assert len(read_lines(tmp_path / "out/metrics.jsonl")) == 4
    assert (tmp_path / "out/model/model.safetensors").is_file()


def test_logs_and_tensorboard_that_cannot_be_written_cost_one_warning_each(
    job, small_disk, tmp_path
):
    out = tmp_path / "out"
    running = job(
        out, faults={0: {"place": "step", "call": 3, "delay": 0, "signal": int(signal.SIGSTOP)}}
    )
    running.wait_until_stopped()
    fill(small_disk)
    shutil.rmtree(out / "tensorboard")
    (out / "tensorboard").symlink_to(small_disk)
    for name in ("metrics", "events", "windows", "observations"):
        (out / f"{name}.jsonl").unlink()
        (out / f"{name}.jsonl").symlink_to("/dev/full")
    running.kill(running.pids[0], signal.SIGCONT)
    assert running.end() == [0, 0], running.said()[-3000:]
    said = running.said()
    assert "Traceback" not in said and (out / "model/model.safetensors").is_file()
    for what in ("metrics.jsonl", "events.jsonl", "windows.jsonl", "observations.jsonl", "TensorBoard's events"):
        assert said.count(f"{what} cannot be written") == 1, said
    assert said.count("warning: no summary can be printed: ") == 1


def test_logs_that_are_removed_during_training_are_started_again(job, tmp_path):
    out = tmp_path / "out"
    running = job(
        out, faults={0: {"place": "step", "call": 5, "delay": 0, "signal": int(signal.SIGSTOP)}}
    )
    running.wait_until_stopped()
    (out / "metrics.jsonl").unlink()
    running.kill(running.pids[0], signal.SIGCONT)
    assert running.end() == [0, 0], running.said()[-3000:]
    assert [row["step"] for row in read_lines(out / "metrics.jsonl")] == list(range(5, 21))
    assert running.said().count("metrics.jsonl was removed or replaced") == 1
    assert "Traceback" not in running.said()


# ---- what must not fail


def test_a_full_disk_at_the_export_is_75_and_the_same_command_finishes_it(
    job, finished, small_disk
):
    out, log = small_disk / "out", str(small_disk.with_name("log"))
    running = job(
        out,
        log=log,
        faults={0: {"place": "export", "call": 1, "delay": 0, "signal": int(signal.SIGSTOP)}},
    )
    running.wait_until_stopped()
    filler = fill(small_disk)
    running.kill(running.pids[0], signal.SIGCONT)
    assert running.end(grace=20)[0] == 75, running.said()[-3000:]
    said = running.said()
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    assert (
        f"the model could not be written to {out / 'model'}: " in said and "No space left" in said
    )
    assert not (out / "model").exists() and not (out / "model.partial").exists()
    CheckpointManifest.load(out / LAST).verify(out / LAST)
    filler.unlink()
    again = job(out, log=log)
    assert again.end() == [0, 0], again.said()[-3000:]
    assert (out / "model/model.safetensors").read_bytes() == (
        finished[0] / "model/model.safetensors"
    ).read_bytes()


# ---- data of other classes


def classes(folder: Path, names: list[str]) -> Path:
    """Write train and val sets with the classes ``names``; all images are the same."""
    image = next(digits("val"))[1]
    for split in ("train", "val"):
        samples = [(f"{i}", image, "png", i % len(names)) for i in range(128)]
        write_shards(samples, folder / split, samples_per_shard=128, class_names=names)
    return folder


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"c{i}" for i in range(20)], "has 20 classes, but the checkpoint {checkpoint} has 10"),
        ([f"c{i}" for i in range(5)], "has 5 classes, but the checkpoint {checkpoint} has 10"),
        (
            [*map(str, range(9)), "ten"],
            "has 'ten' as class 9, but the checkpoint {checkpoint} has '9'",
        ),
    ],
)
def test_a_checkpoint_is_not_resumed_with_data_of_other_classes(
    forge, finished, tmp_path, world, names, said
):
    other = classes(tmp_path / "other", names)
    refused = Job(
        forge,
        tmp_path / "out",
        other,
        "train.duration=24 steps",
        world=world,
        resume=str(finished[0]),
    )
    assert refused.end()[0] == 2, refused.said()[-3000:]
    assert said.format(checkpoint=finished[0] / LAST) in refused.said()
    assert refused.said().count("error: ") == 1 and "Traceback" not in refused.said()
    assert not (tmp_path / "out/config.yaml").exists()
