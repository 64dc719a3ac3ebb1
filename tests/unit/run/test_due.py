"""The steps at which something is due."""

from __future__ import annotations

from typing import Any

from prelora_ds.config.load import load_config
from prelora_ds.core.duration import Duration
from prelora_ds.core.plan import Plan
from prelora_ds.core.schedule import Timeline
from prelora_ds.run.due import Due

STEPS = range(1, 21)


def due(*overrides: str, begun_at: int = 0, samples: int = 100) -> Due:
    config = load_config("launch/recipes/vit_tiny_debug.yaml", overrides)
    return Due(config, Timeline(samples, 16, Duration("20 steps")), begun_at)


def steps(asked: Any) -> list[int]:
    return [step for step in STEPS if asked(step)]


def test_observations_evaluations_and_rows_come_as_often_as_the_recipe_says() -> None:
    some = due("observe.every=8 steps", "train.eval_every=9 steps", "train.log_every=6")
    assert steps(some.observation) == [8, 16, 20]
    assert steps(some.evaluation) == [9, 18, 20]
    assert steps(some.log) == [6, 12, 18]


def test_norms_are_measured_at_observations_and_at_the_end_of_each_epoch() -> None:
    assert steps(due("observe.every=8 steps").norms) == [7, 8, 13, 16, 19, 20]


def test_checkpoints_are_due_at_both_intervals_and_after_the_best_evaluation() -> None:
    some = due("checkpoint.every=8 steps", "checkpoint.keep_every=5 steps")
    assert steps(lambda step: some.checkpoint(step, improved=False)) == [5, 8, 10, 15, 16, 20]
    assert some.checkpoint(7, improved=True)
    assert not due("checkpoint.keep_best=0").checkpoint(3, improved=True)
    assert steps(lambda step: due("checkpoint.every=null").checkpoint(step, improved=True)) == []


def test_bytes_are_measured_three_steps_after_the_start_of_each_plan_in_each_job() -> None:
    plan = Plan("full", frozenset(), since_step=6)
    assert steps(lambda step: due().bytes(step, plan)) == [9]
    assert steps(lambda step: due(begun_at=12).bytes(step, plan)) == [15]
