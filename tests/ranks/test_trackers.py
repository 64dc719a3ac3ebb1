"""The trackers of a run that is killed, resumed and rolled back: one run, and each figure of a step once."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launches import Job
from support.wandb_service import Service, wandb_service
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prelora_ds.run.log import read_lines

ALL = "run.trackers=[tensorboard,csv,wandb,comet]"
FLUSH_S = 0.2
OFFLINE = {"WANDB_MODE": "offline", "COMET_START_ONLINE": "false",
           "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": str(FLUSH_S)}
OWN = ("step_s", "data_s", "img_s", "peak_gib", "step", "phase")  # differ when a step is repeated, or are not figures

Figures = dict[tuple[str, int], list[float]]  # (name, samples) -> all values


@pytest.fixture
def service() -> Iterator[Service]:
    with wandb_service() as service:
        yield service


def of_csv(out: Path) -> Figures:
    found: Figures = {}
    for path in (out / "trackers/csv").glob("*.csv"):
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header[0] == "step"
        for samples, value in rows:
            found.setdefault((path.stem, int(samples)), []).append(float(value))
    return found


def of_tensorboard(out: Path) -> Figures:
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found: Figures = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    return found


def of_comet(out: Path) -> Figures:
    found: Figures = {}
    for path in (out / "trackers/comet").glob("*.zip"):
        archive = zipfile.ZipFile(path)
        experiment = json.loads(archive.read("experiment.json"))
        assert experiment["offline_id"] == (out / "trackers/id").read_text().strip()
        assert (experiment["project_name"], experiment["resume_strategy"]) == ("prelora_ds", "get_or_create")
        for line in archive.read("messages.json").splitlines():
            message = json.loads(line)
            assert message["type"] in ("metric_msg", "parameter_msg", "log_other"), "only metrics, and no output"
            if message["type"] == "metric_msg" and message["payload"]["metric"]["step"] is not None:
                metric = message["payload"]["metric"]
                found.setdefault((metric["metricName"], metric["step"]), []).append(float(metric["metricValue"]))
    return {key: values for key, values in found.items() if key[0] != "process duration"}  # Comet's own


def of_wandb(service: Service) -> Figures:
    rows = service.rows()
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    return {(name, row["_step"]): [value] for row in rows for name, value in row.items() if not name.startswith("_")}


def sync(said: str, service: Service, folder: Path) -> None:
    """Run the command that the job has printed."""
    [command] = {line.partition("run: ")[2] for line in said.splitlines() if "run: wandb sync" in line}
    environ = os.environ | service.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environ, capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def check_figures(out: Path, service: Service, steps: int) -> None:
    """Compare what all trackers show with metrics.jsonl."""
    rows = read_lines(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    expected = {(key, 64 * row["step"]): value for row in rows for key, value in row.items()
                if isinstance(value, int | float) and key not in OWN}
    for figures in (of_tensorboard(out), of_wandb(service), of_comet(out), of_csv(out)):
        assert [key for key, values in figures.items() if len(values) != 1] == []
        is_csv = not any("/" in name for name, _ in figures)
        for (name, samples), value in expected.items():
            [shown] = figures[(name.replace("/", "_") if is_csv else name, samples)]
            assert shown == pytest.approx(value, rel=1e-6), (name, samples)
        lr = "Train_Samples_lr" if is_csv else "Train/Samples/lr"  # DeepSpeed writes it
        assert sorted(samples for name, samples in figures if name == lr) == [64 * step for step in range(1, steps + 1)]


def test_a_run_that_is_killed_and_resumed_is_one_run_at_all_trackers(forge, shards, tmp_path, service):
    out = tmp_path / "out"
    stop = {0: {"place": "step", "call": 10, "delay": 0, "signal": int(signal.SIGSTOP)}}
    killed = Job(forge, out, shards, ALL, "checkpoint.every=3 steps", env=OFFLINE, faults=stop)
    killed.wait_until_stopped()
    time.sleep(3 * FLUSH_S)
    killed.kill(killed.pids[0])
    assert killed.end()[0] == -signal.SIGKILL, killed.said()[-3000:]
    last = Job(forge, out, shards, ALL, "checkpoint.every=3 steps", env=OFFLINE)
    assert last.end() == [0, 0], last.said()[-3000:]
    said = last.said()
    assert "resuming after step 6" in said and "-> lora" in said
    assert "warning" not in said and "Traceback" not in said
    assert said.count("W&B: offline, because WANDB_MODE is offline") == 1
    assert said.count("Comet: offline, because COMET_START_ONLINE is False") == 1
    archives = out / "trackers/comet"
    assert said.count(f"run: comet upload {archives}/*.zip && mv {archives}/*.zip {archives}/uploaded/") == 1
    assert len(list(archives.glob("*.zip"))) == 2 and list((archives / "unfinished").iterdir()) == []
    sync(said, service, tmp_path)
    assert list(service.history) == [(out / "trackers/id").read_text().strip()]
    check_figures(out, service, steps=20)


def test_a_rollback_leaves_each_figure_once(forge, shards, tmp_path, service):
    out = tmp_path / "out"
    spike = ("optimizer.lr=0.3", "optimizer.warmup=0 steps", "train.divergence.spike=1.5", "train.divergence.over=1",
             "checkpoint.every=2 steps", "convergence=null", "train.divergence.action=rollback",
             "train.divergence.tries=50", "train.duration=8 steps")
    run = Job(forge, out, shards, ALL, *spike, env=OFFLINE, world=1)
    assert run.end() == [0], run.said()[-3000:]
    assert "rolling back to step" in run.said() and "warning" not in run.said()
    sync(run.said(), service, tmp_path)
    check_figures(out, service, steps=8)


def test_a_run_with_a_key_and_a_service_that_answers_is_online(forge, shards, tmp_path, service):
    out, netrc = tmp_path / "out", tmp_path / "netrc"
    netrc.write_text(f"machine {service.address.removeprefix('http://')} login user password {'0' * 40}\n")
    netrc.chmod(0o600)
    env = {"WANDB_BASE_URL": service.address, "NETRC": str(netrc)}
    run = Job(forge, out, shards, "run.trackers=[wandb]", "train.duration=4 steps", "convergence=null",
              "train.log_every=2", env=env, world=1)
    assert run.end() == [0], run.said()[-3000:]
    assert f"W&B: online, because {service.address} answers" in run.said() and "wandb sync" not in run.said()
    assert not (out / "tensorboard").exists()
    assert [row["_step"] for row in service.rows()] == [64, 128, 192, 256]
    assert ["train/loss" in row for row in service.rows()] == [False, True, False, True]
