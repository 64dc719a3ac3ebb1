"""The names that `prelora_ds` exports: imported when they are used, and the pure ones without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prelora_ds

HEAVY = ("torch", "deepspeed", "numpy", "transformers", "peft", "pydantic")
NEED_TORCH = ("find_layout", "LoopEngine", "Phases", "StaleEngineError")


def loaded_after(code: str) -> set[str]:
    """The heavy modules that a new process has loaded after ``code``."""
    report = f"import sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_itself_loads_nothing() -> None:
    assert loaded_after("import prelora_ds; prelora_ds.__version__; dir(prelora_ds)") == set()


def test_the_controller_decides_without_torch_and_without_pydantic() -> None:
    assert loaded_after("""
from prelora_ds import (Adapters, Duration, Layout, Observation, PhaseController, PhaseSpec, PreloraRanks, PreloraTest,
                        Timeline)

layout = Layout({f"{i}.weight": (8, 8) for i in range(2)}, {"q": {0: "0", 1: "1"}}, {"0.": 0, "1.": 1})
phases = [PhaseSpec("full", until=PreloraTest(tau=1.0, zeta=5.0, k=2, m=1)),
          PhaseSpec("lora", Adapters("lora", ("q",), PreloraRanks(2, 4)), train=("adapters",))]
controller = PhaseController(layout=layout, timeline=Timeline(10, 1, Duration("10 steps")), phases=phases, seed=0)
state = controller.initial()
for step in (1, 2):
    assert state.plan.phase == "full"
    state = controller.next(state, Observation(step, 1, 2.0, {"q": {0: 1.0, 1: 1.0 + step / 1000}}))
assert state.plan.phase == "lora" and {spec.rank for spec in state.plan.adapters.values()} == {2, 4}, state
""") == set()


def test_every_pure_name_is_imported_without_torch() -> None:
    names = [name for name in prelora_ds.__all__ if name not in NEED_TORCH]
    assert len(names) > 15
    assert loaded_after(f"from prelora_ds import {', '.join(names)}") <= {"pydantic"}


@pytest.mark.parametrize("name", prelora_ds.__all__)
def test_every_name_is_there_and_type_checkers_see_it(name: str) -> None:
    value = getattr(prelora_ds, name)
    home = f"prelora_ds.{prelora_ds._HOMES[name]}"
    assert value.__module__ == home and value.__name__ == name and name in dir(prelora_ds)

    tree = ast.parse(Path(prelora_ds.__file__).read_text())
    declared = {(alias.name, node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                for alias in node.names if alias.asname == alias.name} - {("__version__", "prelora_ds.version")}
    assert (name, home) in declared and len(declared) == len(prelora_ds.__all__)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'prelora_ds' has no attribute 'PreLora'"):
        prelora_ds.PreLora  # noqa: B018
