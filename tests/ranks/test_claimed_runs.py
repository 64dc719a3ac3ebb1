"""Runs that are restarted with a seed, duration or folder that does not fit what exists."""

from __future__ import annotations

import shutil

import pytest
from support.launches import Job, differences, traces

from prelora_ds.core.codec import from_json
from prelora_ds.core.switch_tests.prelora import Observation
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


def test_a_run_without_a_switch_test_is_observed_too_and_a_kill_loses_nothing(job, tmp_path):
    whole, out = job(tmp_path / "whole", "observe.every=3 steps"), tmp_path / "out"
    assert whole.end() == [0, 0], whole.said()[-3000:]
    killed = job(out, "observe.every=3 steps", faults={0: {"place": "step", "call": 7, "delay": 0}})
    assert killed.end()[0] != 0
    again = job(out, "observe.every=3 steps")
    assert again.end() == [0, 0], again.said()[-3000:]
    assert differences(traces(tmp_path / "whole"), traces(out)) == []

    rows = {row["step"]: row for row in read_lines(out / "metrics.jsonl")}
    seen = [from_json(Observation, row) for row in read_lines(out / "observations.jsonl")]
    assert [(o.step, o.samples) for o in seen] == [(3, 192), (6, 192), (8, 128)]
    for o in seen:
        losses = [rows[step]["train/loss"] for step in range(o.step - o.samples // 64 + 1, o.step + 1)]
        assert o.loss == pytest.approx(sum(losses) / len(losses), rel=1e-12)
        assert o.norms["q"] == {layer: rows[o.step][f"norm/q.{layer:02d}"] for layer in (0, 1)}
    assert read_lines(out / "windows.jsonl") == []
    assert [row["event"] for row in read_lines(out / "events.jsonl") if row["event"] == "plan"] == ["plan"]


def test_logs_without_their_checkpoints_are_refused_before_anything_starts(job, tmp_path):
    out = tmp_path / "out"
    killed = job(out, faults={0: {"place": "step", "call": 7, "delay": 0}})
    assert killed.end()[0] != 0
    before = (out / "metrics.jsonl").read_bytes()
    shutil.rmtree(out / "checkpoints")
    refused = job(out)
    assert refused.end()[0] == 2 and "whose checkpoints were removed" in refused.said()
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(job, tmp_path):
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
    assert "ends the run after step 6, but the checkpoint" in shorter.said()
    assert "is already at step 8" in shorter.said()
