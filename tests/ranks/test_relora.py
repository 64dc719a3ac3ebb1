"""ReLoRA from the recipe to the exported model: full training, cycles of merges, the thaw of the hybrid, LoRA."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from support.checkpoints import engine_of, method_of
from support.launches import Job, differences, kill_and_resume, traces

from prelora_ds.core.merge import Reset
from prelora_ds.engine.merge import merge_adapters
from prelora_ds.engine.optimizer import MOMENTS
from prelora_ds.engine.release import release
from prelora_ds.engine.state import copy_state, gather_full
from prelora_ds.run.checkpoints.checkpoint_folder import BrokenCheckpointError, CheckpointManifest
from prelora_ds.run.checkpoints.resume import read_checkpoint
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


def start(forge, shards, out, zero, mode, **options):
    micro = ["train.micro_batch_size=32"] if zero == 0 else []  # stage 0 does not accumulate
    return Job(forge, out, shards, *SETTINGS, phases(mode=mode), *micro, zero=zero, **options)


@pytest.fixture(scope="module")
def wholes(forge, shards, tmp_path_factory):
    """Uninterrupted runs of the hybrid by ZeRO stage and kernel, each made when it is first needed.

    They merge after steps 5 and 8, and after 10, when the base thaws.
    """
    @cache
    def whole(zero, mode="branch"):
        out = tmp_path_factory.mktemp("relora") / "whole"
        job = start(forge, shards, out, zero, mode)
        assert job.end() == [0, 0], job.said()[-3000:]
        return out

    return whole


@pytest.fixture(scope="module")
def whole(wholes):
    return wholes(2)


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


def test_the_run_measures_the_bytes_that_were_predicted(wholes):
    measured = events(wholes(2, "branch"), "bytes")
    assert [row["phase"] for row in measured] == ["relora", "joint", "lora"]
    assert all(row["worst_deviation"] < 0.02 for row in measured)
    assert [row["measured"]["host"] > 0 for row in measured] == [True, False, False]


@pytest.mark.parametrize(("zero", "mode", "step"), [
    (2, "branch", 6), (3, "branch", 9), (2, "merged", 9),
    *(pytest.param(*more, marks=pytest.mark.long) for more in [
        (0, "branch", 9), (1, "branch", 6), (2, "branch", 4), (2, "branch", 12), (3, "branch", 12)])])
def test_a_run_that_was_killed_equals_the_one_that_was_not(wholes, forge, shards, tmp_path, zero, mode, step):
    """Kill it within a cycle (4), right after a merge (6 and 9), or after the thaw (12)."""
    out = tmp_path / "out"
    kill_and_resume(partial(start, forge, shards, out, zero, mode), step)
    assert differences(traces(wholes(zero, mode)), traces(out)) == []


def test_cycles_that_never_end_are_static_lora(forge, shards, tmp_path):
    runs = []
    for name, merge in (("relora", ", merge: {every: 100 steps}"), ("static", "")):
        method = f"phases=[{FULL}, {{name: lora, adapters: {{rank: 8}}, train: [adapters, rest]{merge}}}]"
        run = Job(forge, tmp_path / name, shards, *SETTINGS, method)
        assert run.end() == [0, 0], run.said()[-3000:]
        runs.append(traces(tmp_path / name))
    assert differences(*runs) == []


@pytest.mark.parametrize(("zero", "mode"), [(0, "branch"), (1, "branch"), (3, "branch"), (2, "merged")])
def test_every_stage_and_kernel_walks_the_same_way(wholes, zero, mode):
    out = wholes(zero, mode)
    assert [(row["step"], row["cycle"]) for row in events(out, "merge")] == [(5, 1), (8, 2)]
    assert [row["phase"] for row in events(out, "plan")] == ["full", "relora", "joint", "lora"]


# ---- from one checkpoint

def test_one_two_and_four_ranks_reset_the_same_moments_and_write_the_same_weights(whole, pools):
    checkpoint = whole / "checkpoints/step-00000004"
    for reset in (Reset("magnitude", 0.75), Reset("random", 0.3)):
        by_world = [pools(world).run(merged_state, folder=checkpoint, reset=reset)[0] for world in (1, 2, 4)]
        assert by_world[0] == by_world[1] == by_world[2]
        assert len(by_world[0]) > 3 * 12


def merged_state(folder, reset):
    """A digest of each weight and moment after a merge."""
    checkpoint, engine = engine_of(folder)
    plan = checkpoint.run.phase.plan
    merge_adapters(engine, replace(plan, cycle=plan.cycle + 1), reset)
    state = copy_state(engine.ds, parked=engine.parked)
    digests = {}
    for name, shape in plan.parameters(engine.layout).items():
        for key in ("value", *(MOMENTS if name in state.adam_steps else ())):
            full = gather_full(state, name, key, shape, torch.device("cpu"))
            digests[name, key] = hashlib.sha256(full.numpy().tobytes()).hexdigest()
    release(engine)
    return digests | state.adam_steps


def test_a_checkpoint_is_refused_with_the_base_of_another_cycle(whole, tmp_path):
    """Those of one cycle share a base, whose name is a hash of its content."""
    root = tmp_path / "checkpoints"
    shutil.copytree(whole / "checkpoints", root)
    bases = [CheckpointManifest.load(root / f"step-{step:08d}").base for step in range(3, 11)]
    assert bases[0] == bases[1] and len(set(bases[2:5])) == 1 and len(set(bases[5:7])) == 1
    assert len({bases[0], bases[2], bases[5]}) == 3
    _, layout = method_of(whole)
    read_checkpoint(root / "step-00000005", layout, 0, 1)
    shutil.rmtree(root / bases[2])
    shutil.copytree(root / bases[0], root / bases[2])
    with pytest.raises(BrokenCheckpointError, match=f"the base with this content is named {bases[0]}"):
        read_checkpoint(root / "step-00000005", layout, 0, 1)
