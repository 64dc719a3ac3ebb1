"""ReLoRA from the recipe to the exported model: full training, cycles of merges, the thaw of the hybrid, LoRA."""

from __future__ import annotations

import signal

import pytest
from support.launches import Job, differences, traces

from prelora_ds.run.log import read_lines

NONE = ("convergence=null", "lora.r_min=8", "lora.r_max=64", "lora.warmup=10 epochs")
SETTINGS = (*NONE, "observe.every=2 steps", "train.duration=18 steps", "checkpoint.every=1 steps",
            "checkpoint.keep_last=30", "train.eval_every=6 steps")
FULL = "{name: full, until: 2 steps}"
RELORA = ("{{name: relora, adapters: {{rank: 8, mode: {mode}}}, train: [adapters, rest], until: 8 steps, "
          "merge: {{every: {every} steps, reset: {{rule: magnitude, share: 0.75}}, rewarm: 2 steps}}}}")
JOINT = "{name: joint, adapters: {rank: 4, from: merge}, train: all, until: 4 steps}"
LORA = "{name: lora, train: [adapters, rest]}"


def phases(every: int = 3, mode: str = "branch") -> str:
    return f"phases=[{FULL}, {RELORA.format(every=every, mode=mode)}, {JOINT}, {LORA}]"


def events(out, kind):
    return [row for row in read_lines(out / "events.jsonl") if row["event"] == kind]


@pytest.fixture(scope="module")
def whole(forge, shards, tmp_path_factory):
    """An uninterrupted run of the hybrid, which merges after steps 5 and 8, and when the base thaws after 10."""
    out = tmp_path_factory.mktemp("relora") / "whole"
    job = Job(forge, out, shards, *SETTINGS, phases())
    assert job.end() == [0, 0], job.said()[-3000:]
    return out


def test_merges_are_logged_with_the_share_that_was_reset(whole):
    merges = events(whole, "merge")
    assert [(row["step"], row["cycle"]) for row in merges] == [(5, 1), (8, 2)]
    assert all(row["reset_share"] == pytest.approx(0.75, abs=1e-3) for row in merges)
    assert all(0 < row["output_change"] < 0.05 for row in merges)
    plans = events(whole, "plan")
    assert [(row["phase"], row["plan"]["cycle"]) for row in plans] == [
        ("full", 0), ("relora", 0), ("joint", 3), ("lora", 3)]
    rates = {row["step"]: row["lr"] for row in read_lines(whole / "metrics.jsonl")}
    assert rates[6] < 0.6 * rates[5] and rates[7] > 1.5 * rates[6]


def test_the_run_measures_the_bytes_that_were_predicted(whole):
    measured = events(whole, "bytes")
    assert [row["phase"] for row in measured] == ["relora", "joint", "lora"]
    assert all(row["worst_deviation"] < 0.02 for row in measured)
    assert [row["measured"]["host"] > 0 for row in measured] == [True, False, False]


@pytest.mark.parametrize("step", [4, 6, 9, 12])
def test_a_run_that_was_killed_equals_the_one_that_was_not(whole, forge, shards, tmp_path, step):
    """Kill it within a cycle, right after a merge, within the second cycle, and after the thaw."""
    out = tmp_path / "out"
    killed = Job(forge, out, shards, *SETTINGS, phases(), faults={1: {"place": "step", "call": step, "delay": 0}})
    assert killed.end()[1] == -signal.SIGKILL, killed.said()[-3000:]
    again = Job(forge, out, shards, *SETTINGS, phases())
    assert again.end() == [0, 0], again.said()[-3000:]
    assert "resuming after step" in again.said()
    assert differences(traces(whole), traces(out)) == []
    assert events(out, "merge") == events(whole, "merge")


def test_cycles_that_never_end_are_static_lora(forge, shards, tmp_path):
    runs = []
    for name, merge in (("relora", ", merge: {every: 100 steps}"), ("static", "")):
        method = f"phases=[{FULL}, {{name: lora, adapters: {{rank: 8}}, train: [adapters, rest]{merge}}}]"
        run = Job(forge, tmp_path / name, shards, *SETTINGS, method)
        assert run.end() == [0, 0], run.said()[-3000:]
        runs.append(traces(tmp_path / name))
    assert differences(*runs) == []


@pytest.mark.parametrize(("zero", "mode"), [(0, "branch"), (3, "branch"), (2, "merged")])
def test_every_stage_and_kernel_walks_the_same_way(forge, shards, tmp_path, zero, mode):
    settings = [phases(mode=mode), *(["train.micro_batch_size=32"] if zero == 0 else [])]
    run = Job(forge, tmp_path / "run", shards, *SETTINGS, *settings, zero=zero)
    assert run.end() == [0, 0], run.said()[-3000:]
    assert [(row["step"], row["cycle"]) for row in events(tmp_path / "run", "merge")] == [(5, 1), (8, 2)]
    resumed = Job(forge, tmp_path / "resumed", shards, *SETTINGS, *settings, zero=zero,
                  resume=str(tmp_path / "run/checkpoints/step-00000008"))
    assert resumed.end() == [0, 0], resumed.said()[-3000:]
    expected, found = traces(tmp_path / "run"), traces(tmp_path / "resumed")
    assert found["model"] == expected["model"]
