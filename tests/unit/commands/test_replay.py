"""`prelora replay` on runs of 300 epochs that were written and not trained."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_ind
from support.histories import write_history

from prelora_ds.core.switch_tests.prelora import Observation, Verdict, Windowing
from prelora_ds.errors import ConfigError
from prelora_ds.reporting.replay import Settings, check_measured, read_logged, replayed
from prelora_ds.reporting.replay_table import grid_as_csv
from prelora_ds.run.folder import RunFolder


@pytest.fixture(scope="module")
def exp1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replay") / "exp1"
    write_history(RunFolder(out), "vit_large_in1k_prelora_exp1")
    return out


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replay") / "full"
    write_history(RunFolder(out), "vit_large_in1k")
    return out


def prelora(*arguments: object, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "prelora_ds.cli", "replay", *map(str, arguments)],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def as_json(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(prelora(*arguments, "--json"))
    return found


def test_the_run_s_own_settings(exp1: Path) -> None:
    warmup, lora = as_json(exp1)["decisions"]
    assert (warmup["phase"], warmup["epoch"], lora["phase"], lora["epoch"]) == (
        "warmup", pytest.approx(33, abs=0.01), "lora", pytest.approx(43, abs=0.01))
    assert "Algorithm 1 passed" in warmup["reason"] and not warmup["extrapolated"]
    assert set(lora["ranks"]) == {"q", "k", "v", "o", "fc1", "fc2"} and len(lora["ranks"]["q"]) == 24
    assert lora["trainable_share"] < 0.1 and 0.3 < lora["step_s"] < 0.45 and lora["step_s_from"] == "by FLOPs"
    assert lora["bytes"] < warmup["bytes"] / 4


def test_the_grid_as_csv(exp1: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(prelora(exp1, "--tau", "0.0001,1", "--csv"))))
    grid = as_json(exp1, "--tau", "0.0001,1")["grid"]
    assert [(float(row["tau"]), row["step"]) for row in rows] == [
        (cell["tau"], "" if cell["step"] is None else str(cell["step"])) for cell in grid]
    assert float(rows[0]["closest_change"]) == grid[0]["closest"]["change"] and rows[1]["closest_what"] == ""


def test_a_grid_of_thresholds_and_what_it_cannot_know(exp1: Path) -> None:
    found = as_json(exp1, "--tau", "0.0001,0.5,1", "--zeta", "5,10")
    cells = {(cell["tau"], cell["zeta"]): cell for cell in found["grid"]}
    assert len(cells) == 6 and cells[0.5, 5.0]["step"] > cells[1.0, 5.0]["step"]
    assert cells[0.0001, 5.0]["step"] is None and cells[0.0001, 5.0]["closest"]["change"] > 0.0001
    assert cells[1.0, 5.0]["hours_saved"] > cells[0.5, 5.0]["hours_saved"] > 0
    assert all(row["extrapolated"] for row in as_json(exp1, "--tau", "0.5")["decisions"]), "it had switched before"
    table = prelora(exp1, "--tau", "0.0001,1")
    assert "never" in table and "> 0.0001" in table


def test_a_baseline_is_asked_when_it_would_have_switched(baseline: Path, exp1: Path) -> None:
    found = as_json(baseline, "--tau", "1", "--zeta", "5")["decisions"]
    assert [row["step"] for row in found] == [row["step"] for row in as_json(exp1)["decisions"]]
    assert [row["extrapolated"] for row in found] == [False, True]
    assert "--tau = None: is required" in prelora(baseline, code=2)


def test_a_run_whose_phases_end_by_durations(tmp_path: Path) -> None:
    out = tmp_path / "relora"
    write_history(RunFolder(out), "vit_large_in1k_relora")
    (relora,) = as_json(out)["decisions"]
    assert (relora["phase"], relora["reason"]) == ("relora", "phase full has lasted 15000 steps")
    assert as_json(out, "--suggest", "0.5")["suggestion"] is None


def test_suggested_thresholds_pass_where_they_are_said_to(exp1: Path) -> None:
    suggestion = as_json(exp1, "--suggest", "0.5")["suggestion"]
    again = as_json(exp1, "--tau", suggestion["tau"], "--zeta", suggestion["zeta"])
    assert again["decisions"][0]["step"] == suggestion["step"] == pytest.approx(46_900, rel=0.02)


def test_fewer_observations(exp1: Path) -> None:
    found = as_json(exp1, "--every", "2 epochs")["decisions"]
    assert found[0]["epoch"] > 33
    assert "the run observed every 1 epoch" in prelora(exp1, "--every", "1.5 epochs", code=2)


# ---- other tests

def tried(run: Path, test: str | None = None, **parameters: list[Any]) -> dict[str, Any]:
    """Like `as_json` with ``--test`` and ``--set``, but in this process, because each start takes a second."""
    return replayed(logged(run), Settings(test, parameters))


logged = cache(lambda run: read_logged(RunFolder(run)))


def test_a_fixed_share_and_a_budget_of_full_training_are_the_same_step(baseline: Path) -> None:
    fixed = tried(baseline, "fixed", at=[0.25, 0.5])["grid"]
    budget = tried(baseline, "budget", share=[0.25, 0.5])["grid"]
    assert [(cell["test"], cell["at"], cell["m"]) for cell in fixed] == [("fixed", 0.25, 3), ("fixed", 0.5, 3)]
    steps = [seen.step for seen in logged(baseline).observations]
    expected = [next(step for step in steps if step >= share * steps[-1]) for share in (0.25, 0.5)]
    assert [cell["step"] for cell in fixed] == [cell["step"] for cell in budget] == expected
    assert all(cell["closest"] is None for cell in fixed)


def test_a_t_test_on_the_losses_of_the_log(baseline: Path) -> None:
    """The loss falls in nearly a straight line within two windows, so that only a tiny alpha lets the test pass."""
    found = tried(baseline, "t_test", alpha=[0.00001, 0.05], m=[5])["grid"]
    assert [(cell["alpha"], cell["k"], cell["m"]) for cell in found] == [(0.00001, 2, 5), (0.05, 2, 5)]
    losses = [seen.loss for seen in logged(baseline).observations]
    lowest = [ttest_ind(losses[n:n + 5], losses[n + 5:n + 10], equal_var=False, alternative="greater").pvalue
              for n in range(0, 290, 5)]
    first = next(n for n, p in enumerate(lowest) if p > 0.00001)
    assert round(found[0]["epoch"]) == 5 * first + 10 and found[1]["step"] is None
    assert found[1]["closest"]["change"] == pytest.approx(1 - max(lowest))
    table = prelora(baseline, "--test", "t_test", "--set", "alpha=0.00001,0.05", "--set", "m=5")
    assert "alpha" in table and "tau" not in table and "never" in table


def test_another_test_takes_the_place_of_the_run_s_own(exp1: Path) -> None:
    own = tried(exp1)
    found = tried(exp1, "fixed", at=[0.05])["decisions"]
    assert [row["phase"] for row in found] == ["warmup", "lora"] and found[0]["epoch"] == pytest.approx(15, abs=0.01)
    assert found[0]["step"] < own["decisions"][0]["step"] and [row["extrapolated"] for row in found] == [False, True]
    assert set(found[0]["ranks"]) == set(own["decisions"][0]["ranks"]), "by Algorithm 2, on windows like the run's own"
    assert tried(exp1, "prelora", tau=[1.0], zeta=[5.0]) == own
    assert tried(exp1, strict=[True, False])["grid"][1]["step"] == own["decisions"][0]["step"]


def test_a_run_by_several_tests_is_replayed(tmp_path: Path) -> None:
    out = tmp_path / "several"
    until = "{any: [{test: prelora, tau: 1.0, zeta: 5.0}, {test: fixed, at: 0.05, m: 3}]}"
    write_history(RunFolder(out), "vit_large_in1k", f"phases=[{{name: full, until: {until}}}, "
                  "{name: lora, adapters: {ranks: {rule: prelora}}, train: [adapters, rest]}]")
    (lora,) = tried(out)["decisions"]
    assert lora["epoch"] == pytest.approx(15, abs=0.01) and "the fixed test: 5 % of the run" in lora["reason"]
    result = tried(out, tau=[1.0, 50.0], at=[0.05, 0.9])
    assert [(cell["tau"], cell["at"], cell["test"]) for cell in result["grid"]] == [
        (tau, at, "prelora, fixed") for tau in (1.0, 50.0) for at in (0.05, 0.9)]
    assert result["grid"][0]["step"] < result["grid"][1]["step"], "Algorithm 1 passes where the other one waits"
    rows = list(csv.DictReader(io.StringIO(grid_as_csv(result))))
    assert [row["at"] for row in rows] == ["0.05", "0.9"] * 2


def test_another_rule_for_ranks_takes_the_place_of_the_run_s_own(exp1: Path) -> None:
    own = as_json(exp1)["decisions"]
    uniform = as_json(exp1, "--ranks", "{rule: uniform, rank: 48}")["decisions"]
    assert {rank for layers in uniform[0]["ranks"].values() for rank in layers.values()} == {48}
    dealt = as_json(exp1, "--ranks", "{rule: random, draw: permuted}")["decisions"]
    for family, layers in own[0]["ranks"].items():
        assert dealt[0]["ranks"][family] != layers
        assert sorted(dealt[0]["ranks"][family].values()) == sorted(layers.values())
    assert dealt[0]["trainable_parameters"] == own[0]["trainable_parameters"]
    assert [row["step"] for row in dealt] == [row["step"] for row in own]
    assert [row["extrapolated"] for row in dealt] == [False, True], "the warm-up would have had other adapters"


@pytest.mark.parametrize(("adapters", "ranks", "said"), [
    ("{kind: vera, rank: 64}", "{rule: random}", "of the kind vera, which has one rank for all linears"),
    ("{kind: ia3}", "{rule: uniform, rank: 4}", "of the kind ia3, which has no ranks"),
])
def test_ranks_that_a_kind_cannot_have_are_refused(tmp_path: Path, adapters: str, ranks: str, said: str) -> None:
    out = tmp_path / "run"
    full = "{name: full, until: {test: prelora, tau: 1.0, zeta: 5.0}}"
    write_history(RunFolder(out), "vit_large_in1k",
                  f"phases=[{full}, {{name: lora, adapters: {adapters}, train: [adapters, rest]}}]")
    assert said in prelora(out, "--ranks", ranks, code=2)


def test_a_measure_that_was_not_logged_is_named_with_the_key_that_logs_it() -> None:
    @dataclass(frozen=True)
    class Spectral:
        title, k, windowing, needs = "spectral", 1, Windowing(1), frozenset({"spectra", "loss"})

        def __call__(self, windows: Any, progress: Any) -> Verdict:
            raise AssertionError

    log = [Observation(1, 1, 1.0, {"q": {0: 1.0}})]
    with pytest.raises(ConfigError, match="compares spectra, which this run did not log") as caught:
        check_measured(Spectral(), "spectral", log)
    assert caught.value.key == "--test" and "observe.spectra" in caught.value.remedy


@pytest.mark.parametrize(("arguments", "said"), [
    (["--test", "t_tset"], "did you mean t_test?"),
    (["--set", "alpha=0.1"], "is not a parameter of a test of this run"),
    (["--test", "t_test", "--suggest", "0.5"], "thresholds of Algorithm 1 only"),
    (["--tau", "a"], "--tau = 'a': is not a list of numbers"), (["--tau", "0"], "--tau = '0'"),
    (["--every", "0 steps"], "longer than 0"), (["--every", "soon"], "is not a duration"),
    (["--ranks", "{rule: energy, share: 0.9}"], "compares spectra, which this run did not log"),
    (["--ranks", "{rule: enegy, share: 0.9}"], "did you mean energy?"),
    (["--ranks", "{rule: energy, share: 90}"], "--ranks share = 90"),
    (["--ranks", "{rule: energy, r_max: 48}"], "--ranks"),
    (["--ranks", "energy"], "write it as a mapping"),
    (["--ranks", "{rule"], "--ranks"),
])
def test_bad_values_are_one_message(exp1: Path, arguments: list[str], said: str) -> None:
    error = prelora(exp1, *arguments, code=2)
    assert said in error and error.count("error:") == 1 and "Traceback" not in error


def test_folders_that_cannot_be_replayed(exp1: Path, tmp_path: Path) -> None:
    assert "does not contain a run" in prelora(tmp_path, code=2)
    for name, text, said in (("setup.json", None, "earlier version"), ("setup.json", "{", "cannot be understood"),
                             ("observations.jsonl", '{"step": 1}\n', "a row cannot be understood"),
                             ("observations.jsonl", "[\n", "line 1"), ("observations.jsonl", "", "not made an observ"),
                             ("origin", "elsewhere", "is a fork")):
        copy = tmp_path / f"{name}-{len(said)}"
        copy.mkdir()
        for path in exp1.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / name).unlink(missing_ok=True)
        if text is not None:
            (copy / name).write_text(text)
        assert said in prelora(copy, code=2)


@pytest.mark.parametrize("arguments", [[], ["--test", "budget", "--set", "share=0.1,0.4"]], ids=["own", "budget"])
def test_it_is_fast_and_imports_no_torch(exp1: Path, arguments: list[str]) -> None:
    """CPU seconds, because other processes may take the cores."""
    code = ("import sys, time, prelora_ds.cli; sys.argv = ['prelora', 'replay', *sys.argv[1:]]\n"
            "try:\n    prelora_ds.cli.main()\nexcept SystemExit:\n    pass\n"
            "print(time.process_time(), 'torch' in sys.modules)")
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, exp1, *arguments], capture_output=True, text=True, check=True)
    seconds, torch = done.stdout.split()[-2:]
    assert torch == "False" and float(seconds) < 2 and time.monotonic() - begun < 60


def changed(run: Path, folder: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """A copy of the run with another content of one file; of a log, of its third row."""
    copy = folder / "copy"
    shutil.copytree(run, copy)
    lines = (copy / name).read_text().splitlines(keepends=True)
    at = 2 if name.endswith("jsonl") else 0
    lines[at] = json.dumps(change(json.loads(lines[at]))) + "\n"
    (copy / name).write_text("".join(lines))
    return copy


@pytest.mark.parametrize(("name", "change", "said"), [
    ("observations.jsonl", lambda row: row | {"norms": {"q": row["norms"]["q"]}}, "line 3 is not an observation"),
    ("observations.jsonl", lambda row: row | {"samples": 0}, "line 3 is not an observation"),
    ("setup.json", lambda value: value | {"samples": 0}, "does not belong to the config"),
    ("setup.json", lambda value: value | {"world_size": 0}, "does not belong to the config"),
])
def test_files_that_are_not_of_one_run(exp1: Path, tmp_path: Path, name: str, change: Callable[[Any], Any],
                                       said: str) -> None:
    message = prelora(changed(exp1, tmp_path, name, change), code=2)
    assert said in message and "Traceback" not in message


def test_a_damaged_line_of_metrics_is_left_out_and_json_and_csv_exclude_each_other(exp1: Path, tmp_path: Path) -> None:
    copy = changed(exp1, tmp_path, "metrics.jsonl", lambda row: "no row")
    assert prelora(copy) == prelora(exp1)
    assert "exclude each other" in prelora(exp1, "--csv", "--json", code=2)
    assert "hours saved" in prelora(exp1)
