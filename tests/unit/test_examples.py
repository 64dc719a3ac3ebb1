"""The examples of docs/ that need no ranks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/examples/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_trainer_of_transformers_follows_the_phases_with_a_callback(tmp_path: Path) -> None:
    walk = example("trainer_callback").train(tmp_path)
    assert [phase for phase, _ in walk] == ["full", "warmup", "lora"]
    full, warmup, lora = (trained for _, trained in walk)
    assert lora < full < warmup
