"""Phases that end by several tests at once, in runs that are killed, resumed, forked, and made on other ranks."""

from __future__ import annotations

import json
from functools import partial

import pytest
from support.launches import Job, check_replay, differences, kill_and_resume, traces

from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import read_lines

SETTINGS = ("convergence=null", "lora.r_min=8", "lora.r_max=64", "lora.warmup=10 epochs", "observe.every=1 step",
            "train.duration=18 steps", "train.eval_every=6 steps", "checkpoint.every=1 steps",
            "checkpoint.keep_last=30")
# At alpha 0.9999 the loss would have to rise without doubt for the t-test to pass, and at 1e-9 it passes anyway.
METHOD = ("phases=[{name: full, until: {any: [{test: fixed, at: 0.3}, {test: t_test, alpha: 0.9999, m: 2}]}}, "
          "{name: lora, adapters: {ranks: {rule: prelora, r_min: 2, r_max: 4}}, train: [adapters, rest], "
          "until: {all: [{test: budget, share: 0.5}, {test: t_test, alpha: 1.0e-9, m: 2}]}}, "
          "{name: last, train: [adapters]}]")


@pytest.fixture(scope="module")
def whole(forge, shards, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("tests") / "whole"
    job = Job(forge, out, shards, *SETTINGS, METHOD)
    assert job.end() == [0, 0], job.said()[-3000:]
    return out


def plans(out):
    """The step at which each phase began, and why."""
    return [(row["phase"], row["step"], row["reason"]) for row in read_lines(out / "events.jsonl")
            if row["event"] == "plan"]


def spent(out, step):
    """The FLOPs that the checkpoint of ``step`` has counted."""
    state = json.loads((out / f"checkpoints/step-{step:08d}/state.json").read_text())
    return state["run"]["phase"]["flops"]


def test_each_phase_ends_by_the_test_that_decides(whole):
    (_, start, _), (lora, at, first), (last, then, second) = plans(whole)
    assert (start, lora, at) == (0, "lora", 6), "30 % of 18 steps"
    assert first == "one of 2 tests passed at test 3: the fixed test: 30 % of the run is step 6 of 18"
    assert last == "last" and 9 < then <= 16 and then % 2 == 0, "at a window"
    assert "FLOPs spent after step" in second and "the t-test: p" in second


@pytest.mark.parametrize("step", [5, pytest.param(8, marks=pytest.mark.long)])
def test_a_run_that_was_killed_equals_the_one_that_was_not(whole, forge, shards, tmp_path, step):
    out = tmp_path / "out"
    kill_and_resume(partial(Job, forge, out, shards, *SETTINGS, METHOD), step)
    assert differences(traces(whole), traces(out)) == []


def test_a_fork_counts_the_flops_of_its_source(whole, forge, shards, tmp_path):
    job = Job(forge, tmp_path / "fork", shards, *SETTINGS, METHOD,
              resume=str(whole / "checkpoints/step-00000008"))
    assert job.end() == [0, 0], job.said()[-3000:]
    assert plans(tmp_path / "fork")[-1] == plans(whole)[-1]
    check_replay(RunFolder(tmp_path / "fork"))
    assert spent(tmp_path / "fork", 18) == spent(whole, 18) > spent(whole, 8) > 0


def test_the_budget_is_spent_at_the_same_step_on_one_rank_at_another_stage(whole, forge, shards, tmp_path):
    job = Job(forge, tmp_path / "one", shards, *SETTINGS, METHOD, "train.micro_batch_size=32", zero=3, world=1)
    assert job.end() == [0], job.said()[-3000:]
    assert [row[:2] for row in plans(tmp_path / "one")] == [row[:2] for row in plans(whole)]
    assert spent(tmp_path / "one", 18) == spent(whole, 18)
