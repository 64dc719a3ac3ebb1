"""Runs that are started again with another seed, duration or folder than fits what is there."""

from __future__ import annotations

import pytest
from support.launches import Job

from prelora_ds.metrics import read_lines

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
