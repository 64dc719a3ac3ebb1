from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.configs import MINIMAL, merged, mistake

from prelora_ds.config.deepspeed_section import NOT_SUPPORTED, OWNED_BY_RECIPE, REFUSED_ZERO_KEYS, ZERO_KEYS
from prelora_ds.config.load import check_world, dump_yaml, load_config, read_deepspeed_json, validate
from prelora_ds.config.tree import Config
from prelora_ds.core.duration import Duration
from prelora_ds.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"convergence": {"tau": 1.0, "zeta": 5.0}}))
    return path


# ---- what the repository ships

def test_there_are_recipes_and_deepspeed_configs_to_test() -> None:
    assert "digits_demo" in [path.stem for path in RECIPES]
    assert {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"} <= {p.stem for p in DS_CONFIGS}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_yaml(config))
    assert load_config(copy) == config


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_every_deepspeed_config_loads_and_is_the_stage_of_its_name(path: Path, recipe: Path) -> None:
    zero = load_config(recipe, deepspeed_config=path).zero
    assert (zero.stage, zero.offload_optimizer) == (int(path.stem[4]), "offload" in path.stem)


# ---- overrides

def test_an_override_wins_over_the_recipe_and_the_last_one_over_the_others(recipe: Path) -> None:
    config = load_config(recipe, ["train.duration=500 steps", "convergence.tau=0.5", "train.micro_batch_size=2",
                                  "lora.families=[q,v]", "train.micro_batch_size=8", "data.flip=false"])
    assert config.train.duration == Duration("500 steps")
    assert config.convergence is not None
    assert (config.convergence.tau, config.convergence.zeta) == (0.5, 5.0)
    assert config.train.micro_batch_size == 8
    assert config.train.global_batch_size == 24
    assert config.lora.families == ("q", "v")
    assert config.data.flip is False


@pytest.mark.parametrize(("written", "overrides", "every"), [
    ({"convergence": {"tau": 1, "zeta": 5, "every": "2 steps"}}, [], "2 steps"),
    ({"convergence": {"tau": 1, "zeta": 5, "every": "2 steps"}}, ["convergence.every=3 steps"], "3 steps"),
    ({"convergence": {"tau": 1, "zeta": 5, "every": "2 steps"}}, ["observe.every=3 steps"], "3 steps"),
    ({"observe": {"every": "2 steps"}}, ["convergence.every=3 steps"], "3 steps"),
    ({"observe": {"every": "2 steps"}}, ["convergence.every=3 steps", "observe.every=4 steps"], "4 steps"),
    ({}, ["convergence={tau: 1, zeta: 5, every: 3 steps}"], "3 steps"),
    ({}, [], "1 epoch"),
])
def test_a_former_name_of_a_key_is_read_in_recipes_and_overrides(
        tmp_path: Path, written: dict[str, Any], overrides: list[str], every: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | written))
    config = load_config(path, overrides)
    assert config.observe.every == Duration(every)
    assert (config.convergence is not None) == ("convergence" in written or "tau" in str(overrides))


def test_a_key_under_both_of_its_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"observe": {"every": "2 steps"}}))
    error = mistake(path, ["convergence={tau: 1, zeta: 5, every: 3 steps}"])
    assert (error.key, error.value) == ("convergence.every", "3 steps")
    assert "former name of observe.every" in error.problem and "remove convergence.every" in error.remedy


def test_an_override_can_take_a_section_away_or_fill_it(recipe: Path) -> None:
    assert load_config(recipe, ["convergence=null"]).convergence is None
    lora = load_config(recipe, ["lora.r_min=2", "lora.r_max=4", "lora.warmup=5 %"]).lora
    assert (lora.r_min, lora.r_max, lora.warmup) == (2, 4, Duration("5 %"))


def test_an_override_reaches_the_deepspeed_section_of_a_recipe(recipe: Path) -> None:
    assert load_config(recipe, ["deepspeed.zero_optimization.stage=2"]).zero.stage == 2


def test_the_deepspeed_json_replaces_the_recipes_section(recipe: Path) -> None:
    assert load_config(recipe, (), ROOT / "ds_configs/zero3.json").zero.stage == 3


def test_values_are_taken_from_other_keys_and_the_environment(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS", "/scratch/shards")
    config = load_config(recipe, ["run.output_dir=out/${run.name}", "data.train=${oc.env:SHARDS}/train"])
    assert (config.run.output_dir, config.data.train) == ("out/t", "/scratch/shards/train")


@pytest.mark.parametrize("override", ["train.log_every", "=3", ""])
def test_what_is_no_override_is_refused_with_an_example(recipe: Path, override: str) -> None:
    error = mistake(recipe, [override])
    assert (error.key, error.value) == ("override", override)
    assert "train.log_every=10" in error.remedy


@pytest.mark.parametrize("override", [
    "run.name=${no.such.key}", "run.name=${oc.env:NO_SUCH_VAR}", "run.name=${",
    "run.name=${run.name}", "lora.r_min=${lora.r_max} lora.r_max=${lora.r_min}"])
def test_an_interpolation_that_leads_nowhere_is_named(recipe: Path, override: str) -> None:
    error = mistake(recipe, override.split(" "))
    assert error.key == "recipe and overrides"
    assert error.value == f"{recipe} {override}"


@pytest.mark.parametrize(("key", "text", "problem"), [
    ("train.log_every", "[1,", "cannot be read: line 1, column 4: "),
    ("run.name", "", "cannot be read: has no value"),
    ("run.name", "'a", "cannot be read: line 1, column 3: while scanning a quoted scalar"),
    ("lora.families", "[q, &a [*a]]", "cannot be read: line 1, column 5: is nested"),
    ("optimizer.betas.0", "0.5", "optimizer.betas is a list, which an override must set as a whole"),
    ("lora.families.1", "q", "lora.families is a list"),
    ("run.name.first", "a", "run.name is 't', which has no keys"),
    ("deepspeed." + ".".join("a" * 99), "1", "names a key of more than"),
])
def test_an_override_that_cannot_be_read_is_named_with_the_cause(
    recipe: Path, key: str, text: str, problem: str
) -> None:
    error = mistake(recipe, [f"{key}={text}"])
    assert key in (error.key, str(error.value).partition("=")[0])
    assert error.problem.startswith(problem)


# ---- keys and values

@pytest.mark.parametrize(("override", "key", "value", "remedy"), [
    ("train.micro_batch_sise=4", "train.micro_batch_sise", 4, "did you mean train.micro_batch_size?"),
    ("convergence.taus=4", "convergence.taus", 4, "did you mean convergence.tau?"),
    ("trane.log_every=4", "trane", {"log_every": 4}, "did you mean train?"),
    ("data.xyzzy=1", "data.xyzzy", 1, "valid keys: train, val, reader, samples_per_epoch, tail, "
     "crop, flip, augment, mixup, cutmix, random_erasing, corrupt_budget, cache_dir, cache_gib, workers, worker_start"),
    ("lora.rmin=1", "lora.rmin", 1, "did you mean lora.r_min?"),
])
def test_an_unknown_key_is_named_with_its_value_and_what_may_be_meant(
    recipe: Path, override: str, key: str, value: object, remedy: str
) -> None:
    error = mistake(recipe, [override])
    assert (error.key, error.value, error.remedy) == (key, value, remedy)
    assert error.problem == f"unknown key (in the override of {override.partition('=')[0]})"
    assert key in str(error)
    assert repr(value) in str(error)
    assert remedy in str(error)


def test_a_required_key_that_is_misspelt_is_told_as_a_misspelling() -> None:
    values = merged({"train": {"duratoin": "3 steps"}})
    del values["train"]["duration"]
    error = mistake(values, "r.yaml", call=validate)
    assert (error.key, error.remedy) == ("train.duratoin", "did you mean train.duration?")


def test_a_missing_key_is_named() -> None:
    values = merged({})
    del values["data"]["val"]
    error = mistake(values, "r.yaml", call=validate)
    assert (error.key, error.problem, error.remedy) == ("data.val", "is required (in r.yaml)", "set data.val")


@pytest.mark.parametrize(("changes", "key", "value", "problem"), [
    ({"convergence": {"tau": -1, "zeta": 5}}, "convergence.tau", -1, "greater than 0"),
    ({"convergence": {"tau": 1, "zeta": "much"}}, "convergence.zeta", "much", "valid number"),
    ({"train": {"duration": "soon"}}, "train.duration", "soon", "'soon' is not a duration"),
    ({"train": {"duration": "5 %"}}, "train.duration", "5 %", "must be given in steps or epochs"),
    ({"lora": {"r_max": 48}}, "lora.r_max", 48, "r_max 48 is not a power of two"),
    ({"optimizer": {"betas": [.9, 1.0]}}, "optimizer.betas.1", 1.0, "less than 1"),
    ({"model": {"image_size": 30}}, "model.image_size", 30, "image_size 30 is not divisible by patch_size 16"),
])
def test_a_bad_value_is_told_with_key_value_and_source(
    changes: dict[str, dict[str, Any]], key: str, value: object, problem: str
) -> None:
    error = mistake(merged(changes), "r.yaml", call=validate)
    assert (error.key, error.value) == (key, value)
    assert problem in error.problem
    assert "families" in key or "(in r.yaml)" in error.problem


def test_families_of_ones_own_are_not_held_to_those_of_a_vit() -> None:
    config = validate(merged({"model": {"families": {"gate": r"(?P<layer>\d+)"}}, "lora": {"families": ["gate"]}}), "r")
    assert config.lora.families == ("gate",)


# ---- files

def test_a_missing_recipe_is_told_with_the_nearest_name(recipe: Path) -> None:
    error = mistake(recipe.with_name("recipee.yaml"))
    assert (error.key, error.problem) == ("--recipe", "does not exist")
    assert error.remedy == f"did you mean {recipe}?"
    assert mistake(recipe.with_name("other.yaml")).remedy == "check the path; launch/recipes/ has examples"


@pytest.mark.parametrize(("content", "problem"), [
    (b"train: [1, 2", "is not valid YAML: line 1, column 13: while parsing a flow sequence, expected"),
    (b"x: 1\na: b: c", "is not valid YAML: line 2, column 5: mapping values are not allowed here"),
    (b"\xff\xfe\x00\xd8", "is not a UTF-8 text"), (b"- a\n- b\n", "must be a mapping"),
    (b"x: 1\n\ty: 1", "is not valid YAML: line 2, column 1: "), (b"", "must be a mapping"),
    (b"x: 1\ny: 2\n'x': 1\n", "is not valid YAML: line 3, column 1: the key 'x' occurs twice (first in line 1)"),
    (b"x: &x {y: 1, y: 2}\n", "is not valid YAML: line 1, column 14: the key 'y' occurs twice (first in line 1)"),
    (b"x: 1\n---\ny: 1\n", "is not valid YAML: line 2, column 1: expected a single document"),
    (b"x: !!int 0100\n", "is not valid YAML: line 1, column 4: tags (!...) are not supported"),
    (b"x: &x [*x]\n", "is not valid YAML: line 1, column 4: is nested more than"),
    (b"a: &a {b: 1}\nc:\n  <<: *a\n", "is not valid YAML: line 3, column 3: `<<` is not part of"),
    (b"[a, b]: 1\n", "is not valid YAML: line 1, column 1: a key must be a text"),
    (b"[" * 5000, "is not valid YAML: is nested more than"),
    (b"x: \x01", "is not valid YAML: line 1: the character '\\x01'"),
    (b'x: "\\0"', "is not valid YAML: the text '\\x00' contains the character"),
    (b'x: "\\ud800"', "is not valid YAML: the text '\\ud800' contains the character"),
    (b"x: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + b"".join(
        b"x%d: &x%d [%s]\n" % (i, i, b", ".join([b"*x%d" % (i - 1)] * 10)) for i in range(1, 9)),
     "is not valid YAML: the document contains more than 100,000 values"),
])
def test_what_is_not_a_recipe_is_refused_with_line_and_cause(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    error = mistake(path)
    assert (error.key, error.value) == ("--recipe", str(path))
    assert error.problem.startswith(problem)


def test_a_missing_deepspeed_json_is_refused(recipe: Path, tmp_path: Path) -> None:
    error = mistake(recipe, (), tmp_path / "zero9.json")
    assert (error.key, error.value) == ("--deepspeed_config", str(tmp_path / "zero9.json"))
    assert "ds_configs" in error.remedy


@pytest.mark.parametrize(("content", "problem"), [
    (b"{stage: 2}", "is not valid JSON: Expecting"), (b"", "is not valid JSON:"),
    (b"\xff\xfe", "is not a UTF-8 text"),
    (b"[1]", "must be a JSON object"), (b"2", "must be a JSON object"),
    (b'{"bf16": {"enabled": true, "enabled": true}}', "is not valid JSON: the key 'enabled' occurs twice"),
    (b'{"prescale_gradients": NaN}', "is not valid JSON: NaN is not a finite number"),
    (b'{"gradient_predivide_factor": 1e999}', "is not valid JSON: 1e999 is not a finite number"),
    (b"[" * 100_000, "is not valid JSON: is nested more than"),
    (b'{"a":' * 50 + b"1" + b"}" * 50, "is not valid JSON: is nested"),
    (b'{"comms_logger": "\\ud800"}', "is not valid JSON: the text '\\ud800' contains"),
    (b'{"comms_logger": ' + b"9" * 5000 + b"}", "is not valid JSON: contains a number with more digits"),
])
def test_what_is_not_a_json_object_is_refused(
    recipe: Path, tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    error = mistake(recipe, (), path)
    assert (error.key, error.value) == ("--deepspeed_config", str(path))
    assert error.problem.startswith(problem)


# ---- one owner per key
REFUSED = [("offload_param", {"device": "cpu"}), ("zenflow", {"topk_ratio": .1}), ("zero_hpz_partition_size", 8),
           ("zero_quantized_weights", True), ("zero_quantized_gradients", True),
           ("zero_quantized_nontrainable_weights", True), ("cpu_offload", True), ("mics_shard_size", 2),
           ("compute_grad_norm", False), ("cpu_offload_param", True), ("cpu_offload_use_pin_memory", True),
           ("elastic_checkpoint", True), ("ignore_unused_parameters", False), ("leaf_module", {"classes": ["Block"]}),
           ("legacy_stage1", True), ("save_muon_momentum_buffer_in_memory", True),
           ("stage3_gather_fp16_weights_on_model_save", True), ("stage3_module_granularity_threshold", 5000)]


def test_every_refused_key_has_a_value_that_is_refused() -> None:
    assert {key for key, _ in REFUSED} == set(REFUSED_ZERO_KEYS)


def test_every_key_that_deepspeed_knows_is_either_tried_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    # mics_shard_size is read outside of the schema, in DeepSpeed's MiCS_Init
    assert known | {"mics_shard_size"} == set(ZERO_KEYS) | set(REFUSED_ZERO_KEYS)


def deepspeed_json(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("key", OWNED_BY_RECIPE)
def test_a_deepspeed_json_that_sets_what_the_recipe_owns_names_both_places(tmp_path: Path, key: str) -> None:
    path = deepspeed_json(tmp_path, {"zero_optimization": {"stage": 2}, key: 17})
    error = mistake(path, call=read_deepspeed_json)
    assert (error.key, error.value) == (f"{path}: {key}", 17)
    assert OWNED_BY_RECIPE[key] in error.problem
    assert error.remedy == f'remove "{key}" from {path} and set it in the recipe'


@pytest.mark.parametrize("key", NOT_SUPPORTED)
def test_a_deepspeed_key_that_cannot_be_set_anywhere_is_refused_with_the_reason(tmp_path: Path, key: str) -> None:
    path = deepspeed_json(tmp_path, {"zero_optimization": {"stage": 2}, key: 17})
    error = mistake(path, call=read_deepspeed_json)
    assert (error.key, error.value) == (f"{path}: {key}", 17)
    assert error.problem == f"is not supported: {NOT_SUPPORTED[key]}"
    assert error.remedy == f'remove "{key}" from {path}'


@pytest.mark.parametrize("key", [*OWNED_BY_RECIPE, *NOT_SUPPORTED])
def test_auto_leaves_a_key_to_its_owner(recipe: Path, tmp_path: Path, key: str) -> None:
    path = deepspeed_json(tmp_path, {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, key: "auto"})
    assert load_config(recipe, (), path).deepspeed == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(("values", "key"), [
    ({"zero_optimization": "auto"}, "zero_optimization"),
    ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": "auto"}}, "zero_optimization.offload_optimizer"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}},
     "zero_optimization.offload_optimizer.device"),
])
def test_auto_is_refused_where_nothing_settles_it(recipe: Path, tmp_path: Path, values: dict[str, Any],
                                                  key: str) -> None:
    path = deepspeed_json(tmp_path, values)
    error = mistake(path, call=read_deepspeed_json)
    assert (error.key, error.value) == (f"{path}: {key}", "auto")
    if not key.endswith(("device", "offload_optimizer")):
        assert "phases.*.zero_stage" in error.remedy and "0, 1, 2 or 3" in error.remedy
    assert mistake(MINIMAL | {"deepspeed": values}, "r.yaml", call=validate).key == f"the DeepSpeed config: {key}"
    own = MINIMAL | {"phases": {"lora": {"deepspeed": values}}}
    assert mistake(own, "r.yaml", call=validate).key == f"phases.lora.deepspeed: {key}"


def test_an_override_of_the_stage_is_not_auto_either(recipe: Path) -> None:
    error = mistake(recipe, ["deepspeed.zero_optimization.stage=auto"])
    assert error.key == "the DeepSpeed config: zero_optimization.stage"
    phase = load_config(recipe, ["phases.lora.zero_stage=auto"]).phases.lora
    assert phase.zero_stage == "auto"


@pytest.mark.parametrize(("own", "key", "told"), [
    ({"zero_optimization": {"stage": 3}}, "deepspeed.zero_optimization.stage", "is 2 in this file and 3 in the recipe"),
    ({}, "deepspeed.zero_optimization", "not set in the recipe"),
    ({"zero_optimization": {"stage": 2, "overlap_comm": True}}, "deepspeed.zero_optimization.overlap_comm",
     "is not set in this file and True in the recipe"),
    ("zero2", "deepspeed", "and 'zero2' in the recipe"),
])
def test_a_section_of_the_recipe_is_not_silently_replaced_by_a_file(recipe: Path, tmp_path: Path, own: Any, key: str,
                                                                    told: str) -> None:
    path = deepspeed_json(tmp_path, {"zero_optimization": {"stage": 2}})
    recipe.write_text(yaml.safe_dump(MINIMAL | {"deepspeed": own}))
    error = mistake(recipe, (), path)
    assert (error.key, error.value) == ("--deepspeed_config", str(path))
    assert f"{recipe} has a deepspeed section of its own" in error.problem
    assert f"{key} is" in error.problem and told in error.problem
    assert "remove the section deepspeed from the recipe" in error.remedy


def test_a_section_of_the_recipe_that_is_the_files_own_or_null_is_no_contradiction(recipe: Path,
                                                                                   tmp_path: Path) -> None:
    path = deepspeed_json(tmp_path, {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}})
    for own in ({"zero_optimization": {"stage": 2}, "bf16": "auto"}, None):
        recipe.write_text(yaml.safe_dump(MINIMAL | {"deepspeed": own}))
        assert load_config(recipe, ["deepspeed.zero_optimization.stage=3"], path).zero.stage == 3
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_yaml(load_config(recipe, (), path)))
    assert load_config(stored) == load_config(stored, (), path)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_bucket_that_deepspeed_asserts_to_be_even_is_refused_if_it_is_odd(recipe: Path, stage: int) -> None:
    zero = f"deepspeed={{zero_optimization: {{stage: {stage}, allgather_bucket_size: 3001}}}}"
    error = mistake(recipe, [zero])
    assert error.key == "the DeepSpeed config: zero_optimization.allgather_bucket_size" and error.value == 3001
    assert error.remedy == "write 3002, for example"
    odd = "deepspeed={zero_optimization: {stage: 3, allgather_bucket_size: 3001}}"
    assert load_config(recipe, [odd]).zero.stage == 3
    for own in (stage, "auto"):
        error = mistake(recipe, [odd, f"phases.lora.zero_stage={own}"])
        assert error.key == "the DeepSpeed config with phases.lora: zero_optimization.allgather_bucket_size"


def test_an_override_of_the_deepspeed_json_has_the_last_word(recipe: Path) -> None:
    config = load_config(recipe, ["deepspeed.zero_optimization.stage=3"], "ds_configs/zero2.json")
    assert config.zero.stage == 3


@pytest.mark.parametrize(("values", "key"), [({"bf16": True}, "bf16"), ({"zero_optimization": 2}, "zero_optimization"),
                                             ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
                                              "zero_optimization.offload_optimizer")])
def test_a_section_of_the_wrong_shape_is_refused(tmp_path: Path, values: dict[str, Any], key: str) -> None:
    error = mistake(deepspeed_json(tmp_path, values), call=read_deepspeed_json)
    assert error.key.endswith(f": {key}") and error.problem == "must be a mapping"


@pytest.mark.parametrize("key", ["optimizer", "train_batch_size"])
def test_the_deepspeed_section_of_a_recipe_is_held_to_the_same(key: str) -> None:
    error = mistake(MINIMAL | {"deepspeed": {key: 8}}, "r.yaml", call=validate)
    assert error.key == f"the DeepSpeed config: {key}"


@pytest.mark.parametrize(("values", "key"), [
    *(({"zero_optimization": {"stage": 3, key: value}}, f"zero_optimization.{key}") for key, value in REFUSED),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
     "zero_optimization.offload_optimizer.device"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
     "zero_optimization.offload_optimizer.device"),
    ({"bf16": {"enabled": False}}, "bf16.enabled"),
    ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads"),
    ({"zero_optimisation": {"stage": 2}}, "zero_optimisation"),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}}, "zero_optimization.reduce_bucket_size"),
])
def test_what_does_not_survive_a_switch_is_refused(tmp_path: Path, values: dict[str, Any], key: str) -> None:
    path = deepspeed_json(tmp_path, values)
    assert mistake(path, call=read_deepspeed_json).key == f"{path}: {key}"


@pytest.mark.parametrize("zero", [
    {"stage": 3, "offload_param": {"device": "none"}}, {"stage": 3, "zero_hpz_partition_size": 1},
    {"stage": 3, "zero_quantized_weights": False}, {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
])
def test_what_is_switched_off_or_does_no_harm_is_accepted(tmp_path: Path, zero: dict[str, Any]) -> None:
    values = {"zero_optimization": zero, "bf16": {"enabled": True}, "wall_clock_breakdown": False}
    assert read_deepspeed_json(deepspeed_json(tmp_path, values)) == values


@pytest.mark.parametrize("key", ["run.output_dir", "data.cache_dir", "machine.calibration"])
@pytest.mark.parametrize("url", ["s3://bucket/out", "gs://bucket/out", "file:///tmp/out"])
def test_what_is_written_locally_cannot_be_a_url(key: str, url: str) -> None:
    section, name = key.split(".")
    error = mistake(merged({section: {name: url}}), "r.yaml", call=validate)
    assert (error.key, error.value) == (key, url) and "is a URL" in error.problem


def test_shards_may_be_at_a_url() -> None:
    config = validate(merged({"data": {"train": "s3://bucket/train", "val": "https://host/val"}}), "r.yaml")
    assert config.data.train == "s3://bucket/train"


@pytest.mark.parametrize("zero", ["0 steps", "0 epochs", "0.0 epochs", "0 %"])
@pytest.mark.parametrize(("key", "nullable"), [
    ("checkpoint.every", True), ("checkpoint.keep_every", True), ("train.eval_every", False)])
def test_an_interval_of_nothing_is_refused_and_null_is_named_where_it_may_be(recipe: Path, key: str, zero: str,
                                                                             nullable: bool) -> None:
    error = mistake(recipe, [f"{key}={zero}"])
    assert (error.key, error.value) == (key, zero)
    assert 'is not an interval; write "1 step" for every step' in error.problem
    assert ("or null for none" in error.problem) == nullable
    if nullable:
        assert load_config(recipe, [f"{key}=null"])


# ---- dump and world

def test_dump_yaml_round_trips_every_kind_of_value(tmp_path: Path) -> None:
    config = validate(merged({
        "run": {"name": "007: true", "seed": 3},
        "model": {"factory": "a.b:c", "factory_args": {"width": 3, "deep": {"on": None}},
                  "families": {"x": r"^blocks\.(?P<layer>\d+)\.(q|k)$"}},
        "optimizer": {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-12, "warmup": "0.1 %"},
        "train": {"duration": "1234567 steps", "eval_every": "0.125 epochs"},
        "observe": {"every": "1000000 steps"}, "convergence": {"tau": 0.25, "zeta": 1},
        "lora": {"families": ["x"]}, "deepspeed": {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8}},
    }), "test")
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    again = load_config(path)
    assert again == config
    assert isinstance(again, Config)
    assert again.train.duration.value == 1234567
    assert dump_yaml(again) == dump_yaml(config)


def test_dump_yaml_keeps_no_convergence_as_none(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(validate(MINIMAL, "test")))
    assert load_config(path).convergence is None


def test_check_world_names_key_value_and_figures() -> None:
    config = validate(merged({"deepspeed": {"zero_optimization": {"stage": 2}}}), "test")
    check_world(config, 3)
    error = mistake(config, 5, call=check_world)
    assert (error.key, error.value) == ("train.micro_batch_size", 4)
    assert "24 is not divisible by train.micro_batch_size 4 x 5 ranks = 20" in error.problem


def test_a_bad_override_is_named_as_the_place_of_the_mistake(recipe: Path) -> None:
    for override, key, remedy in (("train.duraton=10 steps", "train.duraton", "did you mean train.duration?"),
                                  ("train.loss=mse", "train.loss", "choose one of them")):
        error = mistake(recipe, (override,))
        assert (error.key, error.remedy) == (key, remedy)
        assert error.problem.endswith(f"(in the override of {key})")


def test_check_world_refuses_accumulation_at_stage_0() -> None:
    config = validate(MINIMAL, "test")
    check_world(config, 6)
    error = mistake(config, 2, call=check_world)
    assert "ZeRO stage 0" in error.problem
    assert "another ZeRO stage" in error.remedy


@pytest.mark.parametrize(("values", "key"), [
    ({"zero_optimization": None}, "zero_optimization"), ({"bf16": None}, "bf16"),
    ({"bf16": {"immediate_grad_update": "x"}}, "bf16.immediate_grad_update"),
    ({"bf16": {"enabled": 1}}, "bf16.enabled"), ({"comms_logger": 5}, "comms_logger"),
    ({"comms_logger": {"nonsense": 1}}, "comms_logger.nonsense"),
    ({"comms_logger": {"verbose": "yes"}}, "comms_logger.verbose"),
    ({"comms_logger": {"prof_ops": "all_reduce"}}, "comms_logger.prof_ops"),
    ({"wall_clock_breakdown": 5}, "wall_clock_breakdown"), ({"memory_breakdown": "x"}, "memory_breakdown"),
    ({"zero_force_ds_cpu_optimizer": "maybe"}, "zero_force_ds_cpu_optimizer"),
])
def test_a_bad_value_of_any_deepspeed_key_is_refused_for_the_run_and_for_each_phase(
        values: dict[str, Any], key: str) -> None:
    """In a later phase the error would end the run only at the switch, perhaps after days."""
    zero = {"zero_optimization": {"stage": 2}}
    for changes in ({"deepspeed": {**zero, **values}}, {"phases": {"lora": {"deepspeed": {**zero, **values}}}}):
        with pytest.raises(ConfigError) as refused:
            validate(merged(changes), "test")
        assert refused.value.key.endswith(f": {key}")


def test_a_section_that_is_as_deepspeed_documents_it_is_taken() -> None:
    comms = {"enabled": True, "verbose": False, "prof_all": False, "debug": False, "prof_ops": ["all_reduce"]}
    zero = {"stage": 2, "offload_optimizer": None}
    assert validate(merged({"deepspeed": {"zero_optimization": zero, "comms_logger": comms}}), "test").zero.stage == 2
