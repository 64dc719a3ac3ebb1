"""Methods that are lists of phases, from the recipe to the exported model."""

from __future__ import annotations

import signal
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.launches import Job, check_replay, differences, traces

from prelora_ds.config.load import load_config
from prelora_ds.engine.state import EngineState, Slice
from prelora_ds.errors import ConfigError
from prelora_ds.model.families import find_layout
from prelora_ds.model.vit import build_model
from prelora_ds.reporting.table import phase_rows
from prelora_ds.run.begin import check_fp32
from prelora_ds.run.checkpoints.checkpoint_folder import step_of
from prelora_ds.run.checkpoints.resume import read_checkpoint
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import read_lines

TEST = "{test: prelora, tau: 90.0, zeta: 90.0, k: 2, m: 1}"
LOW = f"{{name: low, adapters: {{rank: 4, families: [q, fc1]}}, train: [adapters, head], until: {TEST}}}"
FULL, THAW = "{name: full, until: 4 steps}", "{name: thaw, train: all, until: 4 steps, rewarm: 2 steps, zero_stage: 1}"
LAST = "{name: last, train: [adapters, norms], lr_scale: {b: 4.0}, freeze_below: 1}"
# Reset the sections of the preset to their defaults.
NONE = ("convergence=null", "lora.r_min=8", "lora.r_max=64", "lora.warmup=10 epochs")
SETTINGS = (*NONE, "observe.every=2 steps", "train.duration=18 steps", "checkpoint.every=1 steps",
            "checkpoint.keep_last=30", "train.eval_every=6 steps")


def phases(*entries: str) -> str:
    return f"phases=[{', '.join(entries)}]"


@pytest.fixture(scope="module")
def whole(forge, shards, tmp_path_factory):
    """An uninterrupted run of four phases."""
    out = tmp_path_factory.mktemp("methods") / "whole"
    job = Job(forge, out, shards, *SETTINGS, phases(FULL, LOW, THAW, LAST))
    assert job.end() == [0, 0], job.said()[-3000:]
    return out


def walk(out: Path) -> list[tuple[str, int]]:
    """Return the phases of a run and their numbers of steps, after a check that a replay decides like the run."""
    check_replay(RunFolder(out))
    rows = read_lines(out / "metrics.jsonl")
    return [(name, len(list(group))) for name, group in groupby(rows, key=lambda row: row["phase"])]


def differences_after(step: int, run: Path, other: Path) -> list[str]:
    """The differences of the steps after ``step``, and of the exported models, of two runs."""
    expected = traces(run)
    expected["metrics"] = [row for row in expected["metrics"] if row["step"] > step]
    return differences({part: expected[part] for part in ("metrics", "model")}, traces(other))


def test_every_phase_begins_when_the_one_before_is_over(whole):
    assert walk(whole) == [("full", 4), ("low", 4), ("thaw", 4), ("last", 6)]
    plans = [row for row in read_lines(whole / "events.jsonl") if row["event"] == "plan"]
    assert [plan["reason"].partition(":")[0] for plan in plans] == [
        "training begins in phase full", "phase full has lasted 4 steps", "Algorithm 1 passed at test 1",
        "phase thaw has lasted 4 steps"]
    adapters = plans[1]["plan"]["adapters"]
    assert len(adapters) == 4 and {spec["rank"] for spec in adapters.values()} == {4}
    trained = [plan["trainable_parameters"] for plan in plans]
    assert trained[2] > trained[0] > trained[1] and trained[2] > trained[3]
    assert [row["phase"] for row in phase_rows(RunFolder(whole))] == ["full", "low", "thaw", "last"]


def test_the_learning_rate_rises_again_if_a_phase_sets_rewarm(whole):
    rates = {row["step"]: row["lr"] for row in read_lines(whole / "metrics.jsonl")}
    assert rates[9] < 0.5 * rates[8] and rates[10] > 1.6 * rates[9]


def test_a_window_belongs_to_the_phase_in_which_it_began(whole):
    windows = read_lines(whole / "windows.jsonl")
    assert [row["last_step"] for row in windows] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert [row["last_step"] for row in windows if row["verdict"]] == [8]  # two windows of the phase low


@pytest.mark.parametrize("step", [7, 11, 15])
def test_a_run_that_was_killed_in_any_phase_equals_the_one_that_was_not(whole, forge, shards, tmp_path, step):
    """Kill it in the frozen phase, whose fp32 values the thaw needs, in the thaw, and after it."""
    out, settings = tmp_path / "out", (*SETTINGS, phases(FULL, LOW, THAW, LAST))
    killed = Job(forge, out, shards, *settings, faults={1: {"place": "step", "call": step, "delay": 0}})
    assert killed.end()[1] == -signal.SIGKILL, killed.said()[-3000:]
    again = Job(forge, out, shards, *settings)
    assert again.end() == [0, 0], again.said()[-3000:]
    assert "resuming after step" in again.said()
    assert differences(traces(whole), traces(out)) == []


def test_a_fork_keeps_past_phases_and_may_change_later_ones(whole, forge, shards, tmp_path):
    source = whole / "checkpoints/step-00000006"
    assert step_of(source) == 6
    fork = Job(forge, tmp_path / "fork", shards, *SETTINGS, phases(FULL, LOW.replace("k: 2", "k: 3"), "{name: rest}"),
               resume=str(source))
    assert fork.end() == [0, 0], fork.said()[-3000:]
    assert walk(tmp_path / "fork") == [("low", 4), ("rest", 8)]
    refused = Job(forge, tmp_path / "other", shards, *SETTINGS, phases("{name: full, until: 2 steps}", LOW, LAST),
                  resume=str(source))
    assert refused.end()[0] == 2 and "phases.full.until = " in refused.said(), refused.said()[-3000:]
    assert "which is in phase low" in refused.said()


def test_a_fork_that_observes_otherwise_begins_its_windows_anew(whole, forge, shards, tmp_path):
    """The windows of its source last two steps; the test needs two windows of one step."""
    out = tmp_path / "fork"
    fork = Job(forge, out, shards, *SETTINGS, "observe.every=1 steps", "train.duration=10 steps",
               phases(FULL, LOW, "{name: rest}"), resume=str(whole / "checkpoints/step-00000006"))
    assert fork.end() == [0, 0], fork.said()[-3000:]
    assert "because observe.every differs" in fork.said()
    assert walk(out) == [("low", 2), ("rest", 2)]
    assert [row["index"] for row in read_lines(out / "windows.jsonl")] == [0, 1, 2, 3]


def test_a_fork_with_other_families_waits_for_the_windows_of_its_ranks(whole, forge, shards, tmp_path):
    """They cannot be taken from the source, which did not measure these families."""
    out = tmp_path / "fork"
    low = f"{{name: low, adapters: {{ranks: {{rule: prelora, r_max: 32}}, families: [q, v]}}, until: {TEST}}}"
    fork = Job(forge, out, shards, *SETTINGS, "train.duration=9 steps", phases(FULL, low, "{name: rest}"),
               resume=str(whole / "checkpoints/step-00000003"))
    assert fork.end() == [0, 0], fork.said()[-3000:]
    assert walk(out) == [("full", 3), ("low", 3)]
    said = fork.said()
    assert said.count("phase low waits until 2 windows have closed") == 1
    assert "warning: the run ends after step 9, before rest can begin: the test of phase low needs 2 windows" in said


def test_a_phase_after_one_at_stage_3_computes_as_after_a_resume(forge, shards, tmp_path):
    """DeepSpeed replaces torch's linear at stage 3, which a resumed job at stage 1 does not do."""
    settings = (*SETTINGS, phases(FULL, "{name: last, train: [head, norms, '.*fc1.*'], zero_stage: 1}"))
    run = Job(forge, tmp_path / "run", shards, *settings, zero=3)
    assert run.end() == [0, 0], run.said()[-3000:]
    resumed = Job(forge, tmp_path / "resumed", shards, *settings, zero=3,
                  resume=str(tmp_path / "run/checkpoints/step-00000006"))
    assert resumed.end() == [0, 0], resumed.said()[-3000:]

    assert differences_after(6, tmp_path / "run", tmp_path / "resumed") == []


HEAD = "{name: head, train: [head], until: 4 steps}"


def test_a_first_phase_that_freezes_keeps_the_fp32_values_of_what_is_thawed(forge, shards, tmp_path):
    """Parked by the first engine, and in the base, from which also a fork may thaw them."""
    settings = (*SETTINGS, phases(HEAD, "{name: all}"))
    run = Job(forge, tmp_path / "run", shards, *settings)
    assert run.end() == [0, 0], run.said()[-3000:]
    host = [row["measured"]["host"] for row in read_lines(tmp_path / "run/events.jsonl") if row["event"] == "bytes"]
    assert host[0] > 0 and host[1] == 0

    source = Job(forge, tmp_path / "source", shards, *SETTINGS, phases("{name: head, train: [head]}"))
    assert source.end() == [0, 0], source.said()[-3000:]
    fork = Job(forge, tmp_path / "fork", shards, *settings, resume=str(tmp_path / "source/checkpoints/step-00000002"))
    assert fork.end() == [0, 0], fork.said()[-3000:]
    assert differences_after(2, tmp_path / "run", tmp_path / "fork") == []


NORMS = "{name: norms, train: [head, norms], until: 4 steps}"


def test_a_fork_thaws_the_fp32_values_of_what_two_phases_froze(forge, shards, tmp_path):
    settings = (*SETTINGS, phases(FULL, NORMS, HEAD, "{name: all}"))
    planned = Job(forge, tmp_path / "planned", shards, *settings)
    assert planned.end() == [0, 0], planned.said()[-3000:]
    source = Job(forge, tmp_path / "source", shards, *SETTINGS, phases(FULL, NORMS, "{name: head, train: [head]}"))
    assert source.end() == [0, 0], source.said()[-3000:]
    fork = Job(forge, tmp_path / "fork", shards, *settings, resume=str(tmp_path / "source/checkpoints/step-00000010"))
    assert fork.end() == [0, 0], fork.said()[-3000:]
    assert differences_after(10, tmp_path / "planned", tmp_path / "fork") == []


def test_the_fp32_values_of_frozen_parameters_survive_another_number_of_ranks(forge, shards, tmp_path):
    settings, out = (*SETTINGS, phases(FULL, NORMS, "{name: head, train: [head]}")), tmp_path / "out"
    killed = Job(forge, out, shards, *settings, faults={1: {"place": "step", "call": 7, "delay": 0}})
    assert killed.end()[1] == -signal.SIGKILL, killed.said()[-3000:]
    last = Job(forge, out, shards, *settings, world=1)
    assert last.end() == [0], last.said()[-3000:]

    config = load_config(out / "config.yaml")
    layout = find_layout(build_model(config.model, 10), config.families())
    before, after = (read_checkpoint(out / f"checkpoints/step-{step:08d}", layout, 0, 1) for step in (6, 10))
    frozen = layout.parameters.keys() - before.run.phase.plan.trainable
    assert after.run.phase.plan.phase == "head" and frozen
    for name in frozen:
        expected, found = (each.engine.slices[name].value for each in (before, after))
        assert found.dtype == torch.float32 and torch.equal(expected, found), name


def test_a_checkpoint_with_bf16_copies_of_what_is_thawed_is_refused_by_all_ranks(ranks):
    ranks.run(only_copies)


def only_copies():
    import torch.distributed as dist

    dtype = torch.bfloat16 if dist.get_rank() == 1 else torch.float32
    slices = {"a": Slice(0, torch.zeros(2, dtype=dtype)), "b": Slice(0, torch.zeros(2, dtype=torch.bfloat16))}
    checkpoint = SimpleNamespace(folder=Path("step-00000006"), engine=EngineState(slices))
    check_fp32(checkpoint, frozenset({"elsewhere"}))
    with pytest.raises(ConfigError, match=r"only BF16 copies of 1 frozen parameters .* such as a"):
        check_fp32(checkpoint, frozenset({"a", "elsewhere"}))
