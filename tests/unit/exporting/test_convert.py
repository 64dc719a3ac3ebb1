"""The settings of a checkpoint that an export uses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.checkpoints import rewrite_state

from prelora_ds.errors import ConfigError
from prelora_ds.exporting.convert import FORMATS, export_checkpoint

FIXTURE = Path(__file__).parents[2] / "fixtures" / "run_of_0.1.0" / "run"


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Return a function that makes a run whose newest checkpoint has another value of a config key."""
    run = tmp_path / "run"
    shutil.copytree(FIXTURE, run)

    def change(key: str, value: Any) -> Path:
        def put(state: Any) -> None:
            *sections, last = key.split(".")
            section = state["config"]
            for name in sections:
                section = section[name]
            section[last] = value

        rewrite_state(run / "checkpoints" / "step-00000016", put)
        return run

    return change


@pytest.mark.parametrize(("key", "value"), [
    ("run.output_dir", "~/x"), ("run.output_dir", "s3://bucket/x"), ("run.seed", 2**70), ("run.name", "a\tb"),
    ("deepspeed.zero_optimization", {"stage": 2, "ignore_unused_parameters": False}),
    ("data.cache_dir", "~/cache"), ("data.train", ""), ("checkpoint.every", "0 steps"), ("train.eval_every", "0 steps"),
    ("optimizer.lr", 0), ("train.global_batch_size", "auto"),
    ("lora.warmup", "soon"), ("phases", {"lora": {"zero_stage": 9}}), ("guard", None),
    ("a_later_section", {}),
])
def test_settings_that_an_export_does_not_use_are_not_read(
    stored: Callable[[str, Any], Path], tmp_path: Path, key: str, value: Any
) -> None:
    export_checkpoint(FIXTURE, tmp_path / "plain", "timm")
    export_checkpoint(stored(key, value), tmp_path / "changed", "timm")
    plain, changed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "changed"))
    assert plain.keys() == changed.keys() and all(plain[name].equal(changed[name]) for name in plain)


@pytest.mark.parametrize("key", ["model.hidden_size", "lora.mode"])
def test_settings_that_an_export_uses_are_checked(stored: Callable[[str, Any], Path], tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        export_checkpoint(stored(key, "odd"), tmp_path / "out", "hf")
    assert refused.value.key == key and not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "deepspeed"])
def test_every_format_ignores_settings_that_it_does_not_use(
    stored: Callable[[str, Any], Path], tmp_path: Path, form: str
) -> None:
    export_checkpoint(stored("run.output_dir", "~/x"), tmp_path / "out", form)
    assert any((tmp_path / "out").iterdir())
