"""A measurement belongs to its step, and an error on one rank is raised on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.launches import Job

from prelora_ds.errors import ConfigError
from prelora_ds.run.checkpoints.checkpoint_folder import CheckpointManifest, list_checkpoints, step_of
from prelora_ds.run.log import read_lines

SPIKE = ("optimizer.lr=0.3", "optimizer.warmup=0 steps", "train.divergence.spike=1.5",
         "train.divergence.over=1", "convergence=null")


def test_a_checkpoint_has_the_accuracy_of_its_own_weights_and_the_best_is_kept(forge, shards, tmp_path):
    """Evaluations every 3 steps and checkpoints every 5 steps coincide only at steps 15 and 20."""
    out = tmp_path / "out"
    run = Job(forge, out, shards, "train.eval_every=3 steps", "checkpoint.every=5 steps",
              "checkpoint.keep_last=1", "checkpoint.keep_best=1", "checkpoint.keep_every=5 steps")
    assert run.end() == [0, 0], run.said()[-3000:]
    measured = {row["step"]: row["val/acc1"] for row in read_lines(out / "metrics.jsonl") if "val/acc1" in row}
    assert list(measured) == [3, 6, 9, 12, 15, 18, 20]
    folders = list_checkpoints(out / "checkpoints")
    assert {step_of(f): CheckpointManifest.load(f).acc1 for f in folders} == {
        step_of(f): measured.get(step_of(f)) for f in folders}
    first_best = min(measured, key=lambda step: (-measured[step], step))
    assert {step_of(f) for f in folders} == {5, 10, 15, 20, first_best}


@pytest.mark.parametrize(("action", "reason"), [
    ("rollback", "but there is no checkpoint to roll back to yet"),
    ("skip", "but the limit of 1 consecutive skipped updates (train.divergence.tries) is reached"),
])
def test_a_run_that_diverges_says_why_its_action_was_not_taken(forge, shards, tmp_path, action, reason):
    run = Job(forge, tmp_path / "out", shards, *SPIKE, "checkpoint.every=20 steps",
              "optimizer.lr=3.0", f"train.divergence.action={action}", "train.divergence.tries=1")
    assert run.end()[0] == 1
    assert f"train.divergence.action = {action}, {reason}" in run.said(), run.said()[-2000:]
    assert "train.divergence.action=skip or rollback" not in run.said()


def test_an_error_in_a_decision_of_rank_0_is_raised_on_every_rank(ranks):
    assert ranks.run(refused_by_rank_0) == ["lora.rank", "lora.rank"]


def refused_by_rank_0():
    from prelora_ds.engine.runtime import on_rank_0

    assert on_rank_0(lambda: 7) == 7

    def refuse():
        raise ConfigError("lora.rank", 0, "is not positive", "choose another")

    with pytest.raises(ConfigError) as refused:
        on_rank_0(refuse)
    return refused.value.key


def test_a_writing_thread_that_fails_on_one_rank_costs_all_ranks_that_checkpoint_only(ranks, tmp_path):
    said = ranks.run(save_with_a_failing_thread, folder=str(tmp_path))
    assert said == [(False, True)] * 2
    assert [step_of(f) for f in list_checkpoints(tmp_path / "checkpoints")] == [2]


def save_with_a_failing_thread(folder):
    from support.runs import Trainer, config

    from prelora_ds.core.controller import PhaseState
    from prelora_ds.core.divergence import DivergenceWatch
    from prelora_ds.core.schedule import Timeline
    from prelora_ds.run.checkpoints import saver as saver_module
    from prelora_ds.run.folder import RunFolder
    from prelora_ds.run.run_state import RunState

    t = Trainer(config("zero2"))
    saver = saver_module.Saver(RunFolder(Path(folder)), t.cfg, Timeline(1000, 8, t.cfg.train.duration),
                               lambda text: None)
    write_part = saver_module.write_part

    def no_memory(*_, **__):
        raise MemoryError("cannot allocate")

    def save():
        t.train(1)
        return saver.save(t.engine, RunState(t.step, PhaseState(t.full), DivergenceWatch()), wait=True)

    saver_module.write_part = no_memory if t.rank == 1 else write_part
    try:
        failed = save()
    finally:
        saver_module.write_part = write_part
    written = save()
    saver.close()
    t.close()
    return failed, written
