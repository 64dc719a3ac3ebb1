"""How ranks start on GPUs, and how they end. G1 ... are the numbers of the checks in docs/first-gpu.md."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.launch import ROOT
from support.launches import DEBUG
from support.pool import free_port

from prelora_ds.accelerator import HIDING_VARIABLES, gpu_count
from prelora_ds.config.load import load_config
from prelora_ds.cost.timing import GPUS, gpu_named
from prelora_ds.hosts.arguments import parse_arguments

GPU = pytest.mark.gpu
FIVE_STEPS = ("train.duration=5 steps", "train.eval_every=5 steps", "convergence=null", "optimizer.warmup=1 steps")


RESUMABLE = ("convergence=null", "optimizer.warmup=1 steps", "train.eval_every=4 steps", "checkpoint.every=4 steps")
HANG_LIMIT_S = 20
ENDLESS = ("train.duration=100000 steps", "train.eval_every=100000 steps", "convergence=null", "checkpoint.every=null",
           f"guard.hang_limit={HANG_LIMIT_S}")


def arguments(out: Path, shards: Path, *more: str) -> list[str]:
    """Return the command line of launch/pretrain.py for a run in ``out``."""
    return ["--recipe", DEBUG, "--deepspeed_config", "ds_configs/zero2.json", f"run.output_dir={out}",
            f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", *more]


@pytest.mark.parametrize("more", [FIVE_STEPS, RESUMABLE, ENDLESS])
def test_the_command_lines_of_this_file_are_valid(tmp_path, more):
    args = parse_arguments(arguments(tmp_path, tmp_path, *more))
    assert load_config(args.recipe, args.overrides, args.deepspeed_config).zero.stage == 2


def ranks_by_hand(environs, out: Path, shards: Path, *more: str) -> list[subprocess.Popen]:
    """Start launch/pretrain.py once for each of ``environs``, as a launcher would."""
    port = str(free_port())
    common = os.environ | {"WORLD_SIZE": str(len(environs)), "LOCAL_SIZE": str(len(environs)), "OMP_NUM_THREADS": "1",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "launch/pretrain.py", *arguments(out, shards, *more)]
    return [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environ)
            for rank, environ in enumerate(environs)]


def finished(processes) -> list[tuple[int, str]]:
    """Return exit codes and outputs."""
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---- G1: a GPU that torch cannot use


@GPU
@pytest.mark.skipif(not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists(), reason="no device file")
def test_g1_a_gpu_that_torch_cannot_use_ends_the_run(tmp_path, shards):
    unseen = dict.fromkeys(HIDING_VARIABLES, "99")  # there is no GPU of this number
    (code, said), = finished(ranks_by_hand([unseen], tmp_path / "out", shards, *FIVE_STEPS))
    assert code == 2 and "there is a GPU here, but torch" in said, said


# ---- G2: one visible device per rank


@GPU
@pytest.mark.parametrize("mpi", [False, True])
def test_g2_a_rank_that_sees_one_gpu_uses_it_whatever_its_local_rank(tmp_path, shards, mpi):
    def environ(rank: int) -> dict[str, str]:
        seen = dict.fromkeys(HIDING_VARIABLES, str(rank % gpu_count()))
        variables = {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2",
                     "OMPI_COMM_WORLD_LOCAL_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
        return seen | (variables if mpi else {})

    if gpu_count() >= 2:
        ended = finished(ranks_by_hand([environ(0), environ(1)], tmp_path / "out", shards, *FIVE_STEPS))
        assert [code for code, _ in ended] == [0, 0], ended
        assert len(losses(tmp_path / "out")) == 5
        return
    ended = finished(ranks_by_hand([environ(0), environ(1)], tmp_path / "out", shards, *FIVE_STEPS))
    assert [code for code, _ in ended] == [2, 2] and "used by ranks 0 and 1" in ended[0][1], ended


# ---- G11: from the CPU to a GPU and back


@GPU
def test_g11_a_run_of_the_cpu_resumes_on_a_gpu_and_back(tmp_path, shards):
    out = tmp_path / "out"
    steps = [f"train.duration={n} steps" for n in (4, 8, 12)]
    cpu = {"DS_ACCELERATOR": "cpu"}
    resume: list[str] = []
    for environ, duration, folder in zip((cpu, {}, cpu), steps, ("a", "b", "c"), strict=True):
        (code, said), = finished(ranks_by_hand([environ], out / folder, shards, duration, *RESUMABLE, *resume))
        assert code == 0, said
        resume = ["--resume", str(out / folder)]
    assert len(losses(out / "c")) == 4


# ---- G16: a rank that dies


@GPU
def test_g16_ranks_that_lost_another_one_end_with_a_record(tmp_path, shards):
    if gpu_count() < 2:
        pytest.skip("needs two GPUs")
    attempt = tmp_path / "out.supervise" / "attempt-1"
    attempt.mkdir(parents=True)
    (attempt.parent / "lease.json").write_text(json.dumps({"attempt": 1, "patience_s": 600.0}))
    processes = ranks_by_hand([{}, {}], tmp_path / "out", shards, *ENDLESS, "--supervised", str(attempt))
    log = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    output = processes[0].communicate(timeout=HANG_LIMIT_S + 60)[0]
    assert time.monotonic() - begun < HANG_LIMIT_S + 15
    assert processes[0].returncode in (85, 1, -signal.SIGABRT), output
    recorded = (attempt / "exit-0.json").exists() or (attempt / "fatal-0.txt").read_text()
    assert recorded, "neither an exit record nor stacks"


# ---- G17: preflight's all-reduce


@GPU
def test_g17_preflight_measures_a_rate_that_the_link_can_have():
    import torch

    from prelora_ds.hosts.hostcheck import GPU_MESSAGE_BYTES

    if gpu_count() < 2:
        pytest.skip("needs two GPUs")
    port = free_port()
    processes = []
    for rank in range(2):
        processes.append(subprocess.Popen(
            [sys.executable, "-m", "prelora_ds.hosts.hostcheck"], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=os.environ | dict.fromkeys(HIDING_VARIABLES, str(rank))))
        question = {"ask": "all_reduce", "rank": rank, "world": 2, "master": "127.0.0.1", "port": port,
                    "interface": None, "limit_s": 60.0}
        processes[-1].stdin.write(json.dumps(question) + "\n")
        processes[-1].stdin.close()
    answers = [json.loads(process.stdout.read()) for process in processes]
    assert all(answer["correct"] for answer in answers), answers
    name = gpu_named(torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory / 2**30)
    link_gb_s = GPUS[name].link_gb_s if name else 1000.0
    for answer in answers:
        print(f"G17: {answer} with messages of {GPU_MESSAGE_BYTES >> 20} MiB")
        # Each rank of two sends as much as the message holds.
        assert answer["all_reduce_mb_s"] < 1000 * link_gb_s
