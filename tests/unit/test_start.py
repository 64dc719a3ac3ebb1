"""What the start of a run checks and prints before training."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.configs import mistake

from prelora_ds.config.load import load_config, validate
from prelora_ds.config.tree import Config
from prelora_ds.core.schedule import Timeline
from prelora_ds.start import check_phases, warn_of_a_short_run

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.mark.parametrize(("warmup", "printed"), [
    (4, ""),
    (20, STAMP + r"warning: optimizer\.warmup = 20 steps is longer \(20 steps\) than the run \(10 steps\): .*\n")])
def test_a_warm_up_longer_than_the_run_prints_a_warning_with_the_time(
        warmup: int, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("launch/recipes/vit_tiny_debug.yaml", [
        f"optimizer.warmup={warmup} steps", "train.duration=10 steps", "run.output_dir=o", "data.train=t",
        "data.val=v"])
    timeline = Timeline(64, config.train.global_batch_size, config.train.duration)
    warn_of_a_short_run(config, timeline)
    assert re.fullmatch(printed, capsys.readouterr().out)


# ---- phases that do not fit the model

MODEL = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32}
FULL = {"name": "full", "until": "2 steps"}
MERGED = {"rank": 4, "mode": "merged"}


def method(*phases: dict[str, Any], **sections: Any) -> Config:
    return validate({
        "run": {"name": "t", "output_dir": "o"}, "data": {"train": "a", "val": "b"}, "model": MODEL,
        "train": {"duration": "10 steps", "global_batch_size": 8, "micro_batch_size": 4},
        **({"phases": list(phases)} if phases else {}), **sections}, "test")


def test_a_phase_that_trains_nothing_is_refused_before_training() -> None:
    error = mistake(method(FULL, {"name": "none", "train": ["embeddings"], "freeze_below": 1}), 10, call=check_phases)
    assert error.key == "phases.none"
    assert error.problem == "no parameter would train"


@pytest.mark.parametrize("phase", [
    {"train": "adapters"}, {"train": ["all"], "freeze_below": 1}, {"train": [".*lora.*"], "freeze_below": 1}])
def test_merged_weights_are_refused_at_stage_3_where_one_is_frozen(phase: dict[str, Any]) -> None:
    config = method(FULL, {"name": "b", "adapters": MERGED, "zero_stage": 3, **phase})
    error = mistake(config, 10, call=check_phases)
    assert error.key == "phases.b.adapters.mode"
    assert "complete on every rank" in error.problem


@pytest.mark.parametrize("phase", [
    {"zero_stage": 2, "train": "adapters"}, {"zero_stage": "auto", "train": "adapters"}, {"train": ".*"},
    {"train": "adapters", "adapters": {**MERGED, "dropout": 0.1}}])
def test_merged_weights_are_accepted_where_they_are_whole(phase: dict[str, Any]) -> None:
    """Dropout uses the kernel branch."""
    stage_3 = {"zero_optimization": {"stage": 3}}
    check_phases(method(FULL, {"name": "b", "adapters": MERGED, **phase}, deepspeed=stage_3), 10)


def test_merged_weights_of_the_preset_are_refused_at_stage_3_by_its_key() -> None:
    sections: dict[str, Any] = {"deepspeed": {"zero_optimization": {"stage": 3}},
                                "lora": {"mode": "merged", "r_max": 16}, "convergence": {"tau": 1.0, "zeta": 5.0}}
    error = mistake(method(**sections), 10, call=check_phases)
    assert (error.key, error.value) == ("lora.mode", "merged")
    check_phases(method(**sections, phases={"lora": {"zero_stage": 1}}), 10)


# ---- adapters that the model cannot have

RULE = {"ranks": {"rule": "prelora", "r_max": 32}}
UNTIL_TEST = {"name": "full", "until": {"test": "prelora", "tau": 1.0, "zeta": 5.0}}


@pytest.mark.parametrize(("phases", "key", "value"), [
    ([FULL, {"name": "b", "adapters": {"rank": 17}}], "phases.b.adapters.rank", 17),
    ([UNTIL_TEST, {"name": "b", "adapters": RULE}], "phases.b.adapters.ranks.r_max", 32),
    ([FULL, {"name": "b", "adapters": {"rank": 16}, "until": "1 step"},
      {"name": "c", "adapters": {"rank": 20, "from": "merge"}}], "phases.c.adapters.rank", 20)])
def test_a_rank_above_the_size_of_a_linear_is_refused(phases: list[dict[str, Any]], key: str, value: int) -> None:
    error = mistake(method(*phases), 10, call=check_phases)
    assert (error.key, error.value) == (key, value)
    assert "(16 to 16 features)" in error.problem and "choose at most 16" in str(error.remedy)


def test_a_rank_of_the_preset_above_the_size_of_a_linear_is_refused_by_its_key() -> None:
    sections = {"lora": {"r_max": 32}, "convergence": {"tau": 1.0, "zeta": 5.0}}
    error = mistake(method(**sections), 10, call=check_phases)
    assert (error.key, error.value) == ("lora.r_max", 32)


LORA = {"name": "b", "adapters": {"rank": 4}, "train": ["adapters", "rest"]}
TOP = {"choose": "top_k", "every": "5 steps"}


def test_weights_that_a_regular_expression_lets_train_are_not_quantised() -> None:
    phase = {**LORA, "base": {"dtype": "int8"}}
    check_phases(method(FULL, phase), 10)
    error = mistake(method(FULL, {**phase, "train": ["adapters", r".*\.0\..*q_proj\.weight"]}), 10, call=check_phases)
    assert (error.key, error.value) == ("phases.b.base.dtype", "int8")
    assert "but this phase trains vit.layers.0.attention.q_proj.weight" in error.problem


def test_more_adapters_than_there_are_cannot_train_at_a_time() -> None:
    check_phases(method(FULL, {**LORA, "active": {**TOP, "k": 12}}), 10)
    error = mistake(method(FULL, {**LORA, "active": {**TOP, "k": 13}}), 10, call=check_phases)
    assert (error.key, error.value) == ("phases.b.active.k", 13)
    assert error.problem == "is more than the 12 adapters that train in this phase"
    above = {**LORA, "freeze_below": 1, "active": {**TOP, "k": 7}}
    assert mistake(method(FULL, above), 10, call=check_phases).problem.startswith("is more than the 6 adapters")


def test_no_adapters_can_be_chosen_where_all_of_them_are_frozen() -> None:
    model = {**MODEL, "families": {"q": r"vit\.layers\.(?P<layer>0)\.attention\.q_proj"}}
    frozen = {**LORA, "freeze_below": 1, "active": {**TOP, "share": 0.5}}
    error = mistake(method(FULL, frozen, model=model), 10, call=check_phases)
    assert (error.key, error.problem) == ("phases.b.active", "selects adapters, but none trains")
