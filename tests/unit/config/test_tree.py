from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prelora_ds.config.model import ModelConfig
from prelora_ds.config.preset import ConvergenceConfig, LoraConfig
from prelora_ds.config.training import ObserveConfig, OptimizerConfig, TrainConfig
from prelora_ds.config.tree import Config, DataConfig, RunConfig, ZeroSettings
from prelora_ds.core.duration import Duration

VALUES: dict[str, Any] = {"run": {"name": "r", "output_dir": "o"}, "data": {"train": "t", "val": "v"},
                          "train": {"duration": "10 epochs", "global_batch_size": 24, "micro_batch_size": 6}}
TRAIN = {"duration": "10 epochs", "global_batch_size": 24, "micro_batch_size": 4}


def config(zero: dict[str, Any] | None = None, **train: Any) -> Config:
    deepspeed = {} if zero is None else {"deepspeed": {"zero_optimization": zero}}
    return Config.model_validate({"run": {"name": "t", "output_dir": "o"}, "data": {"train": "a", "val": "b"},
                                  "train": TRAIN | train, **deepspeed})


# ---- Duration

@pytest.mark.parametrize(("text", "value", "unit"), [
    ("500 steps", Fraction(500), "step"), ("1 step", Fraction(1), "step"), ("10 epochs", Fraction(10), "epoch"),
    ("0.25 epochs", Fraction(1, 4), "epoch"), ("5 %", Fraction(5), "%"), ("0.1%", Fraction(1, 10), "%"),
    ("100 %", Fraction(100), "%"), ("  3   epoch ", Fraction(3), "epoch"), ("0 steps", Fraction(0), "step"),
    ("7.0 steps", Fraction(7), "step"),
])
def test_durations_are_read_exactly(text: str, value: Fraction, unit: str) -> None:
    duration = Duration(text)
    assert (duration.value, duration.unit) == (value, unit)


@pytest.mark.parametrize("text", ["", "500", "steps", "-1 steps", "1e3 steps", "5 min", "1,5 epochs", ".5 epochs",
                                  "5 epochs or so", "nan epochs", "5 % steps"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match='is not a duration; write "500 steps", "10 epochs" or "5 %"'):
        Duration(text)


@pytest.mark.parametrize("value", [5, 0.5, None, ["5 steps"]])
def test_a_duration_is_text(value: Any) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        Duration(value)


def test_steps_are_whole_and_a_share_is_at_most_all() -> None:
    with pytest.raises(ValueError, match=r"'2\.5 steps': the number of steps must be an integer"):
        Duration("2.5 steps")
    with pytest.raises(ValueError, match=r"'100\.5 %': must be at most 100 %"):
        Duration("100.5 %")


@pytest.mark.parametrize(("text", "shown"), [
    ("1 steps", "1 step"), ("1.0 epochs", "1 epoch"), ("2 epoch", "2 epochs"), ("0 step", "0 steps"), ("5%", "5 %"),
    ("1 %", "1 %"), ("0.50 epochs", "0.5 epochs"), ("1000000 steps", "1000000 steps"),
    ("1234567 steps", "1234567 steps"), ("0.00001 epochs", "0.00001 epochs"),
])
def test_a_duration_is_shown_as_it_is_written(text: str, shown: str) -> None:
    assert str(Duration(text)) == shown
    assert repr(Duration(text)) == f"Duration({shown!r})"


@given(st.integers(0, 10**12), st.integers(0, 10**6 - 1), st.sampled_from(["epochs", "%"]))
def test_text_round_trips_exactly(whole: int, millionths: int, unit: str) -> None:
    whole = min(whole, 99) if unit == "%" else whole
    duration = Duration(f"{whole}.{millionths:06d} {unit}")
    assert duration.value == whole + Fraction(millionths, 10**6)
    again = Duration(str(duration))
    assert again == duration
    assert hash(again) == hash(duration)


@given(st.integers(0, 10**15))
def test_steps_round_trip_exactly(steps: int) -> None:
    assert Duration(str(Duration(f"{steps} steps"))).value == steps


def test_durations_of_another_unit_or_number_differ() -> None:
    assert len({Duration(text) for text in ("1 step", "1 epoch", "1 %", "2 steps", "1 steps")}) == 4
    assert Duration("1 step") != "1 step"


# ---- the validators

@pytest.mark.parametrize(("model", "values", "message"), [
    (ConvergenceConfig, {"tau": 0, "zeta": 5}, "greater than 0"),
    (ConvergenceConfig, {"tau": -1, "zeta": 5}, "greater than 0"),
    (ConvergenceConfig, {"tau": math.nan, "zeta": 5}, "finite number"),
    (ConvergenceConfig, {"tau": 1, "zeta": 0}, "greater than 0"),
    (ConvergenceConfig, {"tau": 1, "zeta": -5}, "greater than 0"),
    (ConvergenceConfig, {"tau": 1, "zeta": math.nan}, "finite number"),
    (ConvergenceConfig, {"tau": 1}, "Field required"),
    (ConvergenceConfig, {"tau": 1, "zeta": 5, "k": 1}, "greater than or equal to 2"),
    (ConvergenceConfig, {"tau": 1, "zeta": 5, "m": 0}, "greater than 0"),
    (ConvergenceConfig, {"tau": 1, "zeta": 5, "k": 2.5}, "valid integer"),
    (ConvergenceConfig, {"tau": 1, "zeta": 5, "statistic": "median"}, "'mean' or 'last'"),
    (ConvergenceConfig, {"tau": 1, "zeta": 5, "aggregate": "max"}, "'norm_of_mean' or 'mean_of_layers'"),
    (ObserveConfig, {"every": "1"}, "is not a duration"),
    (LoraConfig, {"r_min": 6}, "r_min 6 is not a power of two.*for example 4 or 8"),
    (LoraConfig, {"r_max": 48}, "r_max 48 is not a power of two.*for example 32 or 64"),
    (LoraConfig, {"r_min": 0}, "greater than 0"),
    (LoraConfig, {"r_min": 64, "r_max": 8}, "r_min 64 is larger than r_max 8"),
    (LoraConfig, {"families": []}, "must name at least one family, and each only once"),
    (LoraConfig, {"families": ["q", "v", "q"]}, "must name at least one family, and each only once"),
    (LoraConfig, {"alpha_over_r": 0}, "greater than 0"),
    (LoraConfig, {"alpha_over_r": math.nan}, "finite number"),
    (LoraConfig, {"lr_scale": -1}, "greater than 0"),
    (LoraConfig, {"dropout": 1.0}, "less than 1"),
    (LoraConfig, {"weight_decay": -0.1}, "greater than or equal to 0"),
    (ModelConfig, {"image_size": 32, "patch_size": 5}, "image_size 32 is not divisible by patch_size 5"),
    (ModelConfig, {"hidden_size": 64, "num_attention_heads": 3},
     "hidden_size 64 is not divisible by num_attention_heads 3"),
    (ModelConfig, {"num_hidden_layers": 0}, "greater than 0"),
    (ModelConfig, {"hidden_dropout_prob": math.nan}, "finite number"),
    (ModelConfig, {"attn_implementation": "fast"}, "'sdpa' or 'eager'"),
    (ModelConfig, {"factory": "package.module"}, 'is not of the form "package.module:function"'),
    (ModelConfig, {"factory": "package.module:f"}, "is required with model.factory"),
    (ModelConfig, {"families": {"a": r"layer\.(\d+)"}}, r"has no group \(\?P<layer>\.\.\.\)"),
    (TrainConfig, TRAIN | {"duration": "50 %"}, "must be given in steps or epochs"),
    (TrainConfig, TRAIN | {"duration": "0 epochs"}, "must be longer than zero"),
    (TrainConfig, TRAIN | {"global_batch_size": 0}, "greater than 0"),
    (TrainConfig, TRAIN | {"label_smoothing": 1}, "less than 1"),
    (OptimizerConfig, {"lr": 0}, "greater than 0"),
    (OptimizerConfig, {"lr": math.nan}, "finite number"),
    (OptimizerConfig, {"lr": math.inf}, "finite number"),
    (OptimizerConfig, {"eps": 0}, "greater than 0"),
    (OptimizerConfig, {"betas": [0.9, 1.0]}, "less than 1"),
    (OptimizerConfig, {"betas": [0.9]}, "Field required"),
    (OptimizerConfig, {"min_lr_ratio": 1.1}, "less than or equal to 1"),
    (OptimizerConfig, {"min_lr_ratio": math.nan}, "finite number"),
    (OptimizerConfig, {"clip_grad_norm": -1}, "greater than or equal to 0"),
    (OptimizerConfig, {"weight_decay": math.nan}, "finite number"),
    (DataConfig, {"train": "a", "val": "b", "crop": "centre"}, "'inception', 'pad' or 'none'"),
    (DataConfig, {"train": "a", "val": "b", "workers": -1}, "or an integer >= 0"),
    (DataConfig, {"train": "a", "val": "b", "workers": "many"}, 'must be "auto" or an integer'),
    (DataConfig, {"train": "a", "val": "b", "augment": "medium3"}, "'medium2'"),
    (DataConfig, {"train": "a", "val": "b", "reader": "webdataset"}, "is required with data.reader=webdataset"),
    (DataConfig, {"train": "a", "val": "b", "samples_per_epoch": 9}, "samples_per_epoch"),
    (DataConfig, {"train": "a", "val": "b", "corrupt_budget": 1}, "less than 1"),
    (TrainConfig, TRAIN | {"loss": "hinge"}, "'softmax' or 'sigmoid'"),
    (RunConfig, {"name": "t"}, "Field required"),
    (RunConfig, {"name": "t", "output_dir": "o", "seed": -1}, "greater than or equal to 0"),
    (RunConfig, {"name": "t", "output_dir": "o", "seed": 2**64}, "less than 18446744073709551616"),
    (RunConfig, {"name": "t", "output_dir": "o", "seed": 0.5}, "valid integer"),
    (RunConfig, {"name": "t", "output_dir": "~/o"}, "only a shell expands"),
    (RunConfig, {"name": "", "output_dir": "o"}, "is empty"),
])
def test_bad_values_are_refused(model: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        model(**values)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("model", [RunConfig, ModelConfig, DataConfig, OptimizerConfig, TrainConfig, ObserveConfig,
                                   ConvergenceConfig, LoraConfig, Config])
def test_an_unknown_key_is_refused_everywhere(model: type) -> None:
    with pytest.raises(ValidationError) as caught:
        model(**{"gamma_ray": 1})
    assert ("extra_forbidden", ("gamma_ray",)) in [(e["type"], e["loc"]) for e in caught.value.errors()]


def test_the_config_is_frozen() -> None:
    cfg = config()
    with pytest.raises(ValidationError, match="frozen"):
        cfg.train.micro_batch_size = 8  # type: ignore[misc]


def test_the_edges_of_the_ranges_are_allowed() -> None:
    assert LoraConfig(r_min=1, r_max=1).r_max == 1
    assert ConvergenceConfig(tau=1e-9, zeta=1e-9, k=2, m=1).k == 2
    assert OptimizerConfig(min_lr_ratio=1, clip_grad_norm=0, weight_decay=0).min_lr_ratio == 1
    assert DataConfig(train="a", val="b", workers=0).workers == 0
    assert OptimizerConfig(warmup="100 %").warmup == Duration("100 %")


def test_a_factory_is_not_held_to_the_sizes_of_a_vit() -> None:
    model = ModelConfig(factory="a.b:c", families={"x": r"(?P<layer>\d+)"}, image_size=7, patch_size=2)
    assert model.factory == "a.b:c"


# ---- accumulation

@pytest.mark.parametrize(("world", "expected"), [(1, 6), (2, 3), (3, 2), (6, 1)])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulation_makes_up_the_global_batch(world: int, expected: int, stage: int) -> None:
    assert config({"stage": stage}).grad_accum_steps(world) == expected


@pytest.mark.parametrize("world", [4, 5, 7, 12])
def test_a_batch_that_does_not_divide_is_refused_with_the_figures(world: int) -> None:
    with pytest.raises(ValueError, match=rf"global_batch_size 24 .*micro_batch_size 4 x {world} ranks = {4 * world}"):
        config({"stage": 2}).grad_accum_steps(world)


def test_stage_0_does_not_accumulate() -> None:
    cfg = config({"stage": 0})
    for world, accum in ((1, 6), (2, 3), (3, 2)):
        with pytest.raises(ValueError, match=f"stage 0 accumulates .* in BF16, and {accum} micro-batches per step"):
            cfg.grad_accum_steps(world)
    assert cfg.grad_accum_steps(6) == 1


@pytest.mark.parametrize(("data", "mixup", "mixes"), [
    ({}, 0.0, False), ({"augment": "light1"}, 0.0, False), ({"augment": "medium2"}, 0.5, True),
    ({"augment": "strong2"}, 0.8, True), ({"augment": "medium2", "mixup": 0}, 0.0, False),
    ({"mixup": 0.3}, 0.3, True), ({"cutmix": 1.0}, 0.0, True), ({"augment": "trivial"}, 0.0, False)])
def test_mixup_is_that_of_the_level_unless_it_is_given(data: dict[str, Any], mixup: float, mixes: bool) -> None:
    cfg = DataConfig(train="a", val="b", **data)
    assert (cfg.mixup_alpha, cfg.mixes) == (mixup, mixes)


def test_pairs_are_not_cut_by_a_micro_batch() -> None:
    odd = {**VALUES["train"], "micro_batch_size": 1}
    mixed = Config.model_validate(VALUES | {"train": odd, "data": VALUES["data"] | {"augment": "medium2"},
                                            "deepspeed": {"zero_optimization": {"stage": 2}}})
    with pytest.raises(ValueError, match="micro_batch_size 1 is odd"):
        mixed.grad_accum_steps(1)
    assert mixed.for_phase("full").data.mixes


# ---- what is read of the DeepSpeed config

@pytest.mark.parametrize(("zero", "expected"), [
    (None, ZeroSettings(0)),
    ({}, ZeroSettings(0)),
    ({"stage": 1}, ZeroSettings(1, False, None, 100_000)),
    ({"stage": 2, "reduce_bucket_size": 5e6}, ZeroSettings(2, reduce_bucket_size=5_000_000, overlap_comm=True)),
    ({"stage": 3, "stage3_param_persistence_threshold": 0},
     ZeroSettings(3, persistence_threshold=0, overlap_comm=True)),
    ({"stage": 2}, ZeroSettings(2, overlap_comm=True)),
    ({"stage": 2, "overlap_comm": False}, ZeroSettings(2)),
    ({"stage": 3, "overlap_comm": False}, ZeroSettings(3)),
    ({"stage": 2, "contiguous_gradients": False}, ZeroSettings(2)),
    ({"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True}, ZeroSettings(2, True,
                                                                                              overlap_comm=True)),
    ({"stage": 1, "overlap_comm": True}, ZeroSettings(1)),
    ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, ZeroSettings(2, True)),
    ({"stage": 2, "offload_optimizer": {"device": "none"}}, ZeroSettings(2, False, overlap_comm=True)),
    ({"stage": 2, "offload_optimizer": None}, ZeroSettings(2, False, overlap_comm=True)),
    ({"stage": 3, "offload_optimizer": {"pin_memory": True}}, ZeroSettings(3, False, overlap_comm=True)),
])
def test_zero_settings(zero: dict[str, Any] | None, expected: ZeroSettings) -> None:
    assert config(zero).zero == expected


def test_without_a_zero_section_the_stage_is_0() -> None:
    cfg = Config.model_validate(config().model_dump() | {"deepspeed": {"bf16": {"enabled": True}}})
    assert cfg.zero == ZeroSettings(0)


def test_a_phase_takes_its_own_settings_and_the_rest_from_the_run() -> None:
    config = Config.model_validate(VALUES | {
        "convergence": {"tau": 1.0, "zeta": 5.0},
        "deepspeed": {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}},
        "phases": {"lora": {"zero_stage": 1, "micro_batch_size": 4},
                   "warmup": {"deepspeed": {"zero_optimization": {"stage": 2}}}}})
    assert config.for_phase("full").zero.stage == 3
    assert config.for_phase("full").train == config.train
    lora, warmup = config.for_phase("lora"), config.for_phase("warmup")
    assert (lora.zero.stage, lora.zero.reduce_bucket_size, lora.train.micro_batch_size) == (1, 7, 4)
    assert (warmup.zero.stage, warmup.train) == (2, config.train)
    assert warmup.zero.reduce_bucket_size != 7
    assert lora.train.global_batch_size == config.train.global_batch_size
    assert lora.for_phase("lora") == lora and config.zero.stage == 3


@pytest.mark.parametrize(("width", "stage", "lora", "mode"), [
    (96, 2, {}, "merged"), (384, 0, {}, "merged"), (96, 3, {}, "branch"), (768, 2, {}, "branch"),
    (1024, 0, {}, "branch"), (96, 2, {"dropout": 0.1}, "branch"), (1024, 2, {"mode": "merged"}, "merged"),
    (1024, 2, {"mode": "merged", "dropout": 0.1}, "branch"), (96, 2, {"mode": "branch"}, "branch"),
    (96, 2, {"mode": "peft"}, "peft"),
])
def test_how_an_adapter_computes_goes_by_width_stage_and_dropout(width: int, stage: int, lora: dict[str, Any],
                                                                 mode: str) -> None:
    config = Config.model_validate(VALUES | {"model": {"hidden_size": width, "num_attention_heads": 2}, "lora": lora,
                                             "convergence": {"tau": 1.0, "zeta": 5.0},
                                             "deepspeed": {"zero_optimization": {"stage": stage}}}).for_phase("lora")
    assert config.kernel() == mode
    assert config.kernel(3) == ("branch" if lora == {} else mode)
