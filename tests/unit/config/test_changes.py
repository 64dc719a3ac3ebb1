from __future__ import annotations

from pathlib import Path
from typing import Any

from prelora_ds.config.changes import binding_differences, differences
from prelora_ds.config.load import load_config

OLD = {"run": {"output_dir": "a", "seed": 0}, "train": {"micro_batch_size": 4, "duration": "9 steps"},
       "deepspeed": {"zero_optimization": {"stage": 1}}, "optimizer": {"lr": 1.0}, "convergence": None}


def changed(new: dict[str, Any], *, new_run: bool = False) -> list[tuple[str, Any, Any]]:
    """What differs from OLD and must not."""
    return list(binding_differences(OLD, new, new_run=new_run))


def test_where_and_on_how_many_ranks_may_differ() -> None:
    new = {**OLD, "run": {"output_dir": "b", "seed": 0}, "deepspeed": {"zero_optimization": {"stage": 3}},
           "train": {"micro_batch_size": 8, "duration": "9 steps"}}
    assert changed(new) == []
    assert [key for key, *_ in differences(OLD, new)] == [
        "deepspeed.zero_optimization.stage", "run.output_dir", "train.micro_batch_size"]


def test_what_is_trained_may_not_and_is_named_with_both_values() -> None:
    new = {**OLD, "run": {"output_dir": "a", "seed": 1}, "optimizer": {"lr": 2.0}, "convergence": {"tau": 1.0}}
    assert changed(new) == [("convergence", None, {"tau": 1.0}), ("optimizer.lr", 1.0, 2.0),
                            ("run.seed", 0, 1)]


def test_a_new_run_from_a_checkpoint_may_have_another_schedule_but_no_other_seed() -> None:
    new = {**OLD, "run": {"output_dir": "a", "seed": 1}, "optimizer": {"lr": 2.0},
           "train": {"micro_batch_size": 4, "duration": "99 steps"}}
    assert [key for key, *_ in changed(new, new_run=True)] == ["run.seed"]


def test_an_override_takes_the_place_of_a_value_that_became_a_key(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(Path("launch/recipes/vit_tiny_debug.yaml").read_text() + "  mode: fa\n")
    former = load_config(recipe).lora
    assert (former.mode, former.train_a) == ("branch", False)
    overridden = load_config(recipe, ["lora.mode=merged"]).lora
    assert (overridden.mode, overridden.train_a) == ("merged", True)
