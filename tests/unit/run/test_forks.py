"""What a fork must have in common with its source: past phases, and windows that it compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.claims import config
from support.configs import MINIMAL, mistake

from prelora_ds.config.load import validate
from prelora_ds.config.tree import Config
from prelora_ds.run.forks import check_fork, windows_differ

LIST = ("convergence=null", "lora=null", "observe.every=2 steps")
UNTIL = "{test: prelora, tau: 1.0, zeta: 5.0, k: 2, m: 2}"
SOURCE = f"phases=[{{name: full, until: {UNTIL}}}, {{name: l, adapters: {{rank: 4}}}}]"


def differs(*overrides: str, data: str = "a", index: int = 0) -> str | None:
    """Compare the windows of a fork with those of the run of `SOURCE`."""
    source = config(Path("o"), *LIST, SOURCE).model_dump(mode="json")
    fork = config(Path("o"), *LIST, SOURCE, *overrides)
    return windows_differ(source, {"data.train": "a"}, fork, {"data.train": data}, index, Path("c"))


@pytest.mark.parametrize("overrides", [
    (), ("phases.full.until.k=3",), ("phases.full.until.tau=2",), ("optimizer.lr=0.1",),
    ("phases.l.adapters.rank=8",), ("train.duration=9 epochs",)])
def test_windows_that_are_made_alike_are_kept(overrides: tuple[str, ...]) -> None:
    assert differs(*overrides) is None


@pytest.mark.parametrize(("overrides", "name"), [
    (("observe.every=1 steps",), "observe.every"),
    (("train.label_smoothing=0.3",), "train.label_smoothing"),
    (("phases.full.until.m=1",), "the test that makes windows"),
    (("phases.full.until.statistic=last",), "the test that makes windows"),
    (("phases.l.adapters.families=[q, v]",), "the families whose norms are measured")])
def test_windows_of_other_settings_are_not_compared(overrides: tuple[str, ...], name: str) -> None:
    assert differs(*overrides) == name


def test_windows_of_other_data_are_not_compared() -> None:
    assert differs(data="b") == "data.train"


def test_an_interval_that_is_a_share_of_the_run_depends_on_its_duration() -> None:
    share = ("observe.every=10 %",)
    source = config(Path("o"), *LIST, SOURCE, *share).model_dump(mode="json")
    for duration, name in (("20 steps", None), ("30 steps", "observe.every")):
        fork = config(Path("o"), *LIST, SOURCE, *share, f"train.duration={duration}")
        assert windows_differ(source, {}, fork, {}, 0, Path("c")) == name


def test_windows_that_slide_are_not_compared_with_others() -> None:
    assert differs("phases.full.until.windows=sliding") == "the test that makes windows"
    assert differs("phases.full.until.strict=true") is None


def test_a_budget_needs_the_flops_that_the_source_has_counted() -> None:
    def method(until: Any) -> Config:
        phases = [{"name": "full", "until": "2 steps"}, {**LORA, "until": until}, {"name": "c"}]
        return validate({**MINIMAL, "phases": phases}, "r.yaml")

    fork = method({"any": [{"test": "budget", "share": 0.5}, {"test": "fixed", "at": 0.5}]})
    state: dict[str, Any] = {"config": method("9 steps").model_dump(mode="json"), "run": {"phase": {"index": 1}}}
    error = mistake(state, fork, Path("step-00000006"), call=check_fork)
    assert error.key == "phases.b.until" and "the version that wrote step-00000006 did not count" in error.problem
    check_fork(state, method({"test": "fixed", "at": 0.5}), Path("step-00000006"))
    state["run"]["phase"]["flops"] = 12
    check_fork(state, fork, Path("step-00000006"))
    state["run"]["phase"] = {"index": 0}
    check_fork(state, fork, Path("step-00000002"))


LORA = {"name": "b", "adapters": {"rank": 4}, "train": ["adapters", "rest"]}
MERGE = {"every": "5 steps"}
ACTIVE = {"choose": "top_k", "k": 2, "every": "5 steps"}


@pytest.mark.parametrize(("before", "after", "key"), [
    ({"merge": MERGE}, {"merge": {**MERGE, "every": "6 steps"}}, "merge.every"), ({}, {"merge": MERGE}, "merge"),
    ({"active": ACTIVE}, {"active": {**ACTIVE, "k": 3}}, "active.k"), ({"active": ACTIVE}, {}, "active")])
def test_a_fork_merges_and_chooses_as_its_source_did(before: dict[str, Any], after: dict[str, Any], key: str) -> None:
    def method(phase: dict[str, Any]) -> Config:
        phases = [{"name": "full", "until": "2 steps"}, {**LORA, **phase, "until": "9 steps"}, {"name": "c"}]
        return validate({**MINIMAL, "phases": phases}, "r.yaml")

    state = {"config": method(before).model_dump(mode="json"), "run": {"phase": {"index": 1}}}
    check_fork(state, method(before), Path("step-00000006"))
    error = mistake(state, method(after), Path("step-00000006"), call=check_fork)
    assert error.key == f"phases.b.{key}" and "which is in phase b" in error.problem
    state["run"]["phase"]["index"] = 0
    check_fork(state, method(after), Path("step-00000002"))
