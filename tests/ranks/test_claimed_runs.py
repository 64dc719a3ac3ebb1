"""Runs that are started again with another seed, duration or folder than fits what is there."""

from __future__ import annotations

import shutil

import pytest
from support.launches import Job

from prelora_ds.run.log import read_lines

SETTINGS = ("checkpoint.every=4 steps", "train.duration=8 steps", "convergence=null",
            "model.hidden_dropout_prob=0.1")


@pytest.fixture(scope="module")
def job(forge, shards):
    return lambda out, *arguments, **options: Job(forge, out, shards, *SETTINGS, *arguments, **options)


@pytest.mark.parametrize("seed", [20241125194444, 2**64 - 1])
def test_a_large_seed_trains_on_two_ranks_and_continues_on_one(job, tmp_path, seed):
    out = tmp_path / "out"
    killed = job(out, f"run.seed={seed}", faults={0: {"place": "step", "call": 7, "delay": 0}})
    assert killed.end()[0] != 0
    moved = job(out, f"run.seed={seed}", world=1)
    assert moved.end() == [0], moved.said()[-3000:]
    assert [row["step"] for row in read_lines(out / "metrics.jsonl")] == list(range(1, 9))


def test_logs_without_their_checkpoints_are_refused_before_anything_starts(job, tmp_path):
    out = tmp_path / "out"
    killed = job(out, faults={0: {"place": "step", "call": 7, "delay": 0}})
    assert killed.end()[0] != 0
    before = (out / "metrics.jsonl").read_bytes()
    shutil.rmtree(out / "checkpoints")
    refused = job(out)
    assert refused.end()[0] == 2 and "whose checkpoints were removed" in refused.said()
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(job, tmp_path):
    out = tmp_path / "out"
    killed = job(out, faults={0: {"place": "step", "call": 3, "delay": 0}})
    assert killed.end()[0] != 0
    refused = job(out, "optimizer.lr=0.5")
    assert refused.end()[0] == 2
    assert "set optimizer.lr=0.001, or choose another run.output_dir\n" in refused.said()
    again = job(out)
    assert again.end() == [0, 0], again.said()[-3000:]
    shorter = job(tmp_path / "new", "train.duration=6 steps", resume=str(out))
    assert shorter.end()[0] == 2
    assert "ends the run after step 6, and the checkpoint" in shorter.said()
    assert "is of step 8 already" in shorter.said()
