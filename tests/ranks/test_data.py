"""Data in the step: pairs mixed on the device, unreadable samples counted over all ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from support.launch import ROOT, launch_command
from support.launches import Job
from support.runs import LABELS, Trainer, config

from prelora_ds.data.batch import MicroBatch, draw_mix
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.shards.writer import DIGIT_CLASSES, digits, write_digits, write_shards

DEBUG = "launch/recipes/vit_tiny_debug.yaml"


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_step_trains_on_mixed_pixels_and_targets(ranks, loss):
    ours, by_hand = ranks.run(mixed_step, loss=loss)[0]
    assert ours == pytest.approx(by_hand, rel=1e-6)


def mixed_step(loss):
    """Return the loss of a step with mixing, and that with pixels and targets mixed by hand."""
    from deepspeed import comm

    from prelora_ds.model.vit import logits_of

    t = Trainer(config("zero2", train={"loss": loss, "label_smoothing": 0.1}, micro=4, batch=16))
    first, plain = t.rank * 8, t.batches()
    batches = [MicroBatch(b.images, b.labels, draw_mix(0, torch.zeros(4).numpy(), first + 4 * i, mixup=0.5, cutmix=1.0,
                                                      size=16), ("a fault",) * t.rank) for i, b in enumerate(plain)]
    losses = []
    with t.engine.evaluating():
        for batch in batches:
            images = batch.images.float() / 127.5 - 1
            mixed, shares = images.clone(), torch.zeros(4, LABELS)
            for row in range(4):
                share, weight, top, left, bottom, right = batch.mix[row // 2].tolist()
                partner = images[row ^ 1]
                mixed[row] = weight * images[row] + (1 - weight) * partner
                box = (slice(None), slice(int(top), int(bottom)), slice(int(left), int(right)))
                mixed[row][box] = partner[box]
                shares[row, batch.labels[row]] += share
                shares[row, batch.labels[row ^ 1]] += 1 - share
            shares = 0.9 * shares + 0.1 / LABELS
            logits = logits_of(t.engine.ds(mixed.to(torch.bfloat16))).float()
            if loss == "softmax":
                losses.append(-(shares * logits.log_softmax(-1)).sum(-1).mean())
            else:
                p = torch.sigmoid(logits)
                losses.append(-(shares * p.log() + (1 - shares) * (1 - p).log()).sum(-1).mean())
    by_hand = torch.stack(losses).mean()
    comm.all_reduce(by_hand)
    stats = t.engine.train_step(batches, lr=1e-3)
    assert stats.corrupt == 2  # rank 1 has one in each of its two micro-batches, and rank 0 knows
    t.close()
    return stats.loss, float(by_hand) / t.world


def test_above_the_budget_all_ranks_stop_with_one_message(forge, tmp_path):
    write_digits(tmp_path)
    manifest = Manifest.load(tmp_path / "train")
    with Path(manifest.shard_location(1)).open("r+b") as shard:
        for row in manifest.rows[600:604]:
            shard.seek(int(row["offset"]) + 30)
            shard.write(b"\0\0\0\0")
    out = tmp_path / "out"
    job = Job(forge, out, tmp_path, "train.duration=2 epochs", zero=1)
    codes, said = job.end(), job.said()
    assert codes[0] == 1 and said.count("error: ") == 1, said
    assert re.search(r"error: 3 unreadable samples in epoch 0 exceed data\.corrupt_budget \(0\.001 of 1437 "
                     r"samples\); for example: sample 60[0-3], \d+ bytes from byte \d+ of \S+shard-000001\.tar: "
                     r"checksum \w+, expected \w+; replaced by sample \d+\n  remedy: ", said), said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["data/corrupt"] for row in rows) >= 2


def test_a_run_tolerates_what_the_budget_allows_with_mixup_and_sigmoid(forge, tmp_path):
    write_digits(tmp_path)
    manifest = Manifest.load(tmp_path / "train")
    row = manifest.rows[600]
    with Path(manifest.shard_location(1)).open("r+b") as shard:
        shard.seek(int(row["offset"]) + 30)
        shard.write(b"\0\0\0\0")
    out = tmp_path / "out"
    job = Job(forge, out, tmp_path, "train.duration=1 epoch", "data.augment=medium2", "data.tail=drop",
              "data.workers=auto", "train.loss=sigmoid", f"data.cache_dir={tmp_path / 'cache'}", zero=1)
    assert job.end() == [0, 0], job.said()[-3000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 23))  # 1437 // 64
    assert sum(row["data/corrupt"] for row in rows) == 1 and rows[-1]["epoch"] == 1.0
    assert "data workers: the cores of a rank minus one" in job.said() and "waiting for data, ms" in job.said()
    assert len(list((tmp_path / "cache").glob("*shard-*.tar"))) == 2  # the damaged one is not kept


def test_an_index_truncated_during_a_run_ends_it_with_75_and_one_message(forge, tmp_path):
    """A memory-mapped index would end it with SIGBUS."""
    write_digits(tmp_path)
    out = tmp_path / "out"
    job = Job(forge, out, tmp_path, "train.duration=100000 steps", "train.eval_every=100000 steps",
              "convergence=null", zero=1)
    job.wait_for(out / "metrics.jsonl")
    os.truncate(tmp_path / "train" / "index.npy", 1000)
    codes, said = job.end(), job.said()
    assert 75 in codes and set(codes) <= {75, -9} and said.count("error") == 1, (codes, said)
    assert re.search(r"error( \(rank 1 on \S+\))?: data = '\S+train/index\.npy': has changed since it "
                     r"was opened: its content has changed\n  remedy: restore the data set", said), said


def test_an_image_of_the_evaluation_that_cannot_be_decoded_is_one_message(forge, tmp_path):
    write_digits(tmp_path)
    samples = [(f"{i:03d}", png if i != 20 else b"<html>404</html>", "png", label)
               for i, (_, png, _, label) in enumerate(digits("val"))]
    shutil.rmtree(tmp_path / "val")
    manifest = write_shards(samples, tmp_path / "val", samples_per_shard=512,
                            class_names=DIGIT_CLASSES)
    job = Job(forge, tmp_path / "out", tmp_path, "data.workers=1", zero=1)
    codes, said = job.end(), job.said()
    assert codes[0] == 1 and said.count("error: ") == 1 and "Traceback" not in said, (codes, said)
    offset = manifest.rows["offset"][20]
    assert f"sample 20, 16 bytes from byte {offset} of {manifest.shard_location(0)}: not an image" in said, said
    assert f"remedy: `prelora shards verify {tmp_path / 'val'} --decode` lists" in said, said


def test_a_worker_that_is_killed_is_named_by_its_rank_and_ends_the_run(shards, tmp_path):
    out = tmp_path / "out"
    command, environ = launch_command(
        "--recipe", DEBUG, "--deepspeed_config", "ds_configs/zero1.json", f"run.output_dir={out}",
        f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", "train.duration=100000 steps",
        "train.eval_every=100000 steps", "convergence=null", "data.workers=1")
    with subprocess.Popen(command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as run:
        try:
            until = time.monotonic() + 150
            while not ((out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size):
                assert time.monotonic() < until and run.poll() is None
                time.sleep(0.2)
            worker = worker_of_rank_1(psutil.Process(run.pid))
            worker.kill()
            said, _ = run.communicate(timeout=100)
        finally:
            for process in (*psutil.Process(run.pid).children(recursive=True), run) if run.poll() is None else ():
                process.kill()
    assert run.returncode == 1, said
    assert (said.count("error: "), said.count("error (rank 1 on ")) == (0, 1), said
    gone = rf"error \(rank 1 on [^)]+\): a data worker died \(process: exit code {{{worker.pid}: -9}}"
    assert re.search(gone, said), said


def worker_of_rank_1(launcher):
    """Return the data worker: the only child of the fork server of rank 1."""
    [rank] = [p for p in launcher.children(recursive=True) if "--local_rank=1" in p.cmdline()
              and "launch/pretrain.py" in p.cmdline() and "deepspeed.launcher.launch" not in p.cmdline()]
    return next(child for process in rank.children() for child in process.children())
