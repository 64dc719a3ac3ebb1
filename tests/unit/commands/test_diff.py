"""`prelora diff` on runs that were written and not trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.histories import settling, write_history
from typer.testing import CliRunner

from prelora_ds import cli
from prelora_ds.run.folder import RunFolder

RECIPE = "vit_large_in1k_relora"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run a, b that differs from epoch 100 on and by over 1 % later, and c that logs at other steps."""
    folder = tmp_path_factory.mktemp("diff")
    settings = ("train.duration=200 epochs",)
    write_history(RunFolder(folder / "a"), RECIPE, *settings)
    write_history(RunFolder(folder / "b"), RECIPE, *settings, "optimizer.lr=5.0e-4", "phases.relora.lr_scale=0.2",
                  norm=lambda step, total: settling(step, total) * (1 + max(0, step - total / 2) / total / 10))
    return folder


def differ(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(cli.app, ["diff", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_keys_finals_and_the_first_steps_that_differ(runs: Path) -> None:
    found = differ(runs / "a", runs / "b")
    assert found["config"] == [{"key": "optimizer.lr", "values": [0.001, 0.0005]},
                               {"key": "phases.relora.lr_scale", "values": [0.1, 0.2]}]
    assert [finals["steps"] for finals in found["finals"]] == [62_557] * 2
    assert found["identical_through"] == 30_966 < found["first_difference"] == 31_279
    assert found["first_difference"] < found["first_difference_of_1_percent"] == pytest.approx(37_500, rel=0.02)


def test_a_run_and_itself(runs: Path) -> None:
    found = differ(runs / "a", runs / "a")
    assert (found["config"], found["first_difference"], found["identical_through"]) == ([], None, 62_557)
    said = CliRunner().invoke(cli.app, ["diff", str(runs / "a"), str(runs / "a")]).stdout
    assert "The configs are equal" in said and "identical through step 62557" in said


def test_runs_without_a_common_step(runs: Path, tmp_path: Path) -> None:
    write_history(RunFolder(tmp_path / "c"), RECIPE, "train.duration=200 epochs", samples=1_000_000)
    rows = (tmp_path / "c/metrics.jsonl").read_text().splitlines()
    (tmp_path / "c/metrics.jsonl").write_text(rows[0] + "\n")
    found = differ(runs / "a", tmp_path / "c")
    assert found["common_steps"] == 0 and found["identical_through"] is None
    said = CliRunner().invoke(cli.app, ["diff", str(runs / "a"), str(tmp_path / "c")]).stdout
    assert "have not logged a loss at a common step" in said


def test_a_folder_without_a_run(runs: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["diff", str(runs / "a"), str(tmp_path)])
    assert done.exit_code != 0 and "does not contain a run" in str(done.exception)
