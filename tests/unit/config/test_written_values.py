"""A text stays as it is written, a number follows YAML 1.2 and JSON, and anything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from support.configs import MINIMAL, merged, mistake

from prelora_ds.config.fields import alternatives
from prelora_ds.config.load import dump_yaml, load_config, validate
from prelora_ds.config.tree import Config
from prelora_ds.core.duration import Duration


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"convergence": {"tau": 1.0, "zeta": 5.0}}))
    return path


@pytest.mark.parametrize(
    "text",
    [
        "007",
        "1e3",
        "true",
        "on",
        "2024-11-25",
        "1:30",
        "0x1F",
        "1_000",
        ".inf",
        "x #1",
        "a: b",
        "- a",
        "!x",
        "&a",
        "*a",
        "%x",
        "@x",
        "`x`",
        "???",
        "{x}",
        "[x]",
        "a,b",
        " x ",
        "x=y",
        "|",
        ">",
        "?",
        "é",
        "-",
        "~x",
        "$x",
        "9" * 60,
    ],
)
def test_a_text_stays_as_it_is_written(tmp_path: Path, recipe: Path, text: str) -> None:
    kept = load_config(recipe, [f"run.name={text}"])
    assert kept.run.name == text
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_yaml(kept))
    assert load_config(copy) == kept
    assert load_config(recipe, [f"run.name='{text}'"]).run.name == text
    assert yaml.safe_load(dump_yaml(kept))["run"]["name"] == text  # for readers of YAML 1.1 as well


def test_a_recipe_keeps_a_text_that_looks_like_a_number(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "run: {name: 0100, output_dir: 2024-11-25}\ndata: {train: 1.10, val: true}\n"
        "train: {duration: 1 epoch, global_batch_size: 4, micro_batch_size: 4}\n"
    )
    config = load_config(path)
    assert (config.run.name, config.run.output_dir) == ("0100", "2024-11-25")
    assert (config.data.train, config.data.val) == ("1.10", "true")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.log_every=+5", 5),
        ("train.log_every=1e3", 1000),
        ("train.log_every= 5", 5),
        ("train.log_every=64.0", 64),
        ("optimizer.lr=1e-3", 0.001),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.lr=1", 1.0),
        ("optimizer.lr=5.", 5.0),
        ("data.flip=False", False),
        ("data.flip=TRUE", True),
        ("convergence=~", None),
        ("convergence=Null", None),
        ("optimizer.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("checkpoint.walltime=06:00:00", 21600.0),
        ("model.num_channels=1", 1),
        ("data.workers=0", 0),
        ("data.cache_dir=null", None),
    ],
)
def test_a_value_is_read_by_the_core_schema(recipe: Path, override: str, value: object) -> None:
    found: Any = load_config(recipe, [override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=true",
        "optimizer.lr=1:30",
        "optimizer.lr='1e-3'",
        "optimizer.lr=.nan",
        "optimizer.lr=.inf",
        "optimizer.lr=inf",
        "optimizer.lr=nan",
        "optimizer.lr=1e999",
        "optimizer.lr=1_000.0",
        "optimizer.lr=0x1",
        "optimizer.lr=01",
        "optimizer.lr=\u0661",
        "optimizer.betas=[true, 0.9]",
        "optimizer.betas=['0.8', 0.9]",
        "train.global_batch_size=0100",
        "train.global_batch_size=0o100",
        "train.global_batch_size=0x40",
        "train.global_batch_size=1_000",
        "train.global_batch_size=24.5",
        "train.global_batch_size='24'",
        "train.global_batch_size=1:00",
        "train.global_batch_size=true",
        "train.global_batch_size=2024-01-01",
        "train.log_every=yes",
        "data.flip=1",
        "data.flip=yes",
        "data.flip=on",
        "data.flip='true'",
        "data.flip=0",
        "model.num_channels=true",
        "model.num_channels=1.5",
        "checkpoint.walltime=true",
        "checkpoint.walltime=0600",
        "train.duration=010 steps,",
        "train.duration=5",
    "train.duration=0100 steps",
    "checkpoint.walltime=010 s",
        "train.duration=\u0665 steps",
        "run.name=null",
        "run.output_dir=null",
        "train=5",
        "train=null",
        "run=[a]",
        "deepspeed=2",
        "phases.lora.zero_stage=true",
        "data.workers=true",
        "lora.families=q",
        "data.train=~/x",
        "run.output_dir=~/x",
        "run.output_dir=~",
        "data.cache_dir=~me/x",
        "run.output_dir=''",
        'data.val="a\\nb"',
        'run.output_dir="a\\0b"',
        "run.name=\udcff",
        "run.name=a\x00b",
        "run.output_dir=" + "x" * 256, "data.val=" + "x" * 256, "data.train=" + "x/" * 2001,
        "run.output_dir=/x/" + "é" * 128 + "/y",
        "deepspeed.zero_optimization.reduce_bucket_size=true",
        "deepspeed.zero_optimization.reduce_bucket_size=0100",
        "model.factory_args.width=0100",
        "model.factory_args.width=.inf",
        "train..log_every=1",
        ".train.log_every=1",
        "train.log_every.=1",
        "run.name=" + "${" * 50,
        "optimizer.lr=" + "9" * 5000,
    ],
)
def test_what_is_not_of_the_type_of_its_key_is_refused(recipe: Path, override: str) -> None:
    assert len(str(mistake(recipe, [override]))) < 2000


def test_a_value_of_a_key_that_takes_several_types_is_named_by_the_key_alone(recipe: Path) -> None:
    for key in ("phases.lora.micro_batch_size", "phases.warmup.zero_stage", "data.samples_per_epoch"):
        assert mistake(recipe, [f"{key}=many"]).key == key


def test_every_number_and_switch_of_the_config_refuses_what_only_looks_like_one() -> None:
    """This also covers every key that is added later."""
    checked = set()

    def walk(model: Any, place: tuple[str, ...]) -> None:
        for name, field in model.model_fields.items():
            here, kinds = (*place, field.alias or name), alternatives(field.annotation)
            for section in kinds:
                if isinstance(section, type) and issubclass(section, BaseModel):
                    walk(section, here)
            lookalikes = [
                value
                for kind, value in ((bool, 1), (int, True), (float, True), (int, "1"), (float, "1"))
                if kind in kinds and str not in kinds
            ]
            for value in lookalikes + ["yes"] * (bool in kinds):
                values = merged({"convergence": {"tau": 1, "zeta": 1}})
                section = values
                for part in here[:-1]:
                    section = section.setdefault(part, {})
                section[here[-1]] = value
                key = mistake(values, "r", call=validate).key
                assert key == ".".join(here), (here, value, key)
                checked.add(here)

    walk(Config, ())
    assert len(checked) > 40


def test_the_same_override_twice_means_the_last_and_mappings_are_merged(recipe: Path) -> None:
    config = load_config(
        recipe,
        [
            "train.log_every=2",
            "train={log_every: 3, label_smoothing: 0.1}",
            "train.divergence={action: skip}",
            "train.divergence.tries=5",
        ],
    )
    assert (
        config.train.log_every,
        config.train.label_smoothing,
        config.train.global_batch_size,
    ) == (3, 0.1, 24)
    assert (config.train.divergence.action, config.train.divergence.tries) == ("skip", 5)
    assert (
        load_config(
            recipe, ["convergence=null", "convergence.tau=1", "convergence.zeta=2"]
        ).convergence
        is not None
    )


def test_an_interpolation_is_read_as_if_it_stood_there(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPS", "5")
    monkeypatch.setenv("SWITCH", "false")
    monkeypatch.setenv("NAME", "007")
    config = load_config(
        recipe,
        [
            "train.log_every=${oc.env:STEPS}",
            "data.flip=${oc.env:SWITCH}",
            "run.name=${oc.env:NAME}",
            "run.output_dir=out/${oc.env:NO_SUCH_VAR,7}/${train.micro_batch_size}",
            "train.duration='${oc.env:STEPS} steps'",
            "data.val=${train.micro_batch_size}",
            "optimizer.betas=['${oc.env:NO_SUCH_VAR,0.5}', 0.9]",
        ],
    )
    assert (config.train.log_every, config.data.flip, config.run.name) == (5, False, "007")
    assert (config.run.output_dir, config.train.duration) == ("out/7/4", Duration("5 steps"))
    assert (config.data.val, config.optimizer.betas) == ("4", (0.5, 0.9))
    monkeypatch.setenv("STEPS", "yes")
    assert mistake(recipe, ["train.log_every=${oc.env:STEPS}"]).key == "train.log_every"


@pytest.mark.parametrize(
    ("default", "text"),
    [
        ("2024_11", "2024_11"),
        ("1e10", "1e10"),
        (" 1.10 ", "1.10"),
        ("true", "true"),
        ("'1.10'", "1.10"),
        ("a b", "a b"),
        ("x=1;y", "x=1;y"),
        ("${oc.env:NO_OTHER,1.10}", "1.10"),
        ("'a-${oc.env:NO_OTHER,1.10}'", "a-1.10"),
        ("1.10-${run.seed}", "1.10-0"),
    ],
)
@pytest.mark.parametrize("resolver", ["oc.env:NO_SUCH_VAR", "oc.select:run.nothing"])
def test_the_default_of_an_interpolation_stays_as_it_is_written(
    recipe: Path, resolver: str, default: str, text: str
) -> None:
    given = f"${{{resolver},{default}}}"
    config = load_config(recipe, ["run.seed=0", f"run.name={given}", f"run.output_dir=out-{given}/x"])
    assert (config.run.name, config.run.output_dir) == (text, f"out-{text}/x")


def test_a_default_is_a_number_where_a_number_is_wanted_and_null_where_it_is_null(recipe: Path) -> None:
    config = load_config(
        recipe, ["optimizer.lr=${oc.env:NO_SUCH_VAR,1e-3}", "data.cache_dir=${oc.env:NO_SUCH_VAR,null}",
                 r"run.name=\${oc.env:NO_SUCH_VAR,1.10}"]
    )
    assert (config.optimizer.lr, config.data.cache_dir) == (1e-3, None)
    assert config.run.name == "${oc.env:NO_SUCH_VAR,1.10}"
