"""The machinery of the study (benchmarks/study.py) on the digits: order, forks, a kill, and what is reported."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

from support.launch import kill_tree

from prelora_ds.run.log import read_lines

STUDY = Path(__file__).parents[2] / "benchmarks/study.py"
WANTED = ("uniform", "equal_compute", "hybrid", "freezing")
RUNS = ("full", "exp1", "equal_compute", "uniform", "hybrid", "freezing")  # the first two are what the others need


def study(out):
    return [sys.executable, str(STUDY), "--digits", str(out), "--seeds", "1", "--only", *WANTED]


def test_a_study_that_was_killed_goes_on_and_repeats_nothing(tmp_path):
    results = tmp_path / "results"
    kill_in_exp1(tmp_path)
    full = (results / "full-0.json").read_bytes()
    assert [path.name for path in results.iterdir()] == ["full-0.json"]

    said = finished(tmp_path, 400)
    assert "full, seed 0: running" not in said and "exp1, seed 0: running" in said
    assert "5 of 5 runs; about 0 min left" in said
    assert (results / "full-0.json").read_bytes() == full
    assert {path.stem for path in results.iterdir()} == {f"{name}-0" for name in RUNS}
    check_results({name: json.loads((results / f"{name}-0.json").read_text()) for name in RUNS})
    resumed = [row["step"] for row in read_lines(tmp_path / "exp1-0/events.jsonl") if row["event"] == "resume"]
    assert len(resumed) == 2 and resumed[1] > resumed[0] > 0, "a fork, and then its own checkpoint"

    summary = json.loads((tmp_path / "study.json").read_text())
    assert [row["setting"] for row in summary["rows"]] == list(RUNS)
    assert summary["figures"]["runs"] == 6 and summary["figures"]["seeds"] == 0, "not all of the core has finished"
    assert summary["figures"]["most_steps_between_replay_and_run"] == 0
    assert summary["figures"]["exp1_cost_vs_full"] < 1

    assert "running" not in finished(tmp_path, 60)


def kill_in_exp1(out):
    """Run the study until Exp1 has checkpoints of its own, and kill it with all its processes."""
    with subprocess.Popen(study(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            until = time.monotonic() + 200
            while not (out / "exp1-0/checkpoints/latest").exists():
                assert run.poll() is None and time.monotonic() < until
                time.sleep(0.05)
        finally:
            kill_tree(run)


def finished(out, seconds):
    """Run the study to its end; return what it has printed."""
    with subprocess.Popen(study(out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        try:
            said, _ = run.communicate(timeout=seconds)
        finally:
            kill_tree(run)
    assert run.returncode == 0, said
    return said


def check_results(results):
    full, exp1 = results["full"], results["exp1"]
    assert full["steps_by_phase"] == {"full": full["steps"]} and full["flops_over_full"] == 1
    assert list(exp1["steps_by_phase"]) == ["full", "warmup", "lora"]
    assert exp1["first_switch"] == exp1["replayed_switch"] == exp1["steps_by_phase"]["full"]
    assert 0 < exp1["forked_at"] < exp1["first_switch"] and sum(exp1["steps_by_phase"].values()) == exp1["steps"]
    assert len(set(exp1["ranks"])) > 1
    assert set(results["uniform"]["ranks"]) == {round(mean(exp1["ranks"]))}
    assert results["equal_compute"]["steps"] == round(exp1["flops_over_full"] * full["steps"])
    assert list(results["hybrid"]["steps_by_phase"]) == ["full", "relora", "warmup", "lora"]
    assert results["freezing"]["flops_over_full"] < exp1["flops_over_full"]
    for result in results.values():
        assert 0.1 < result["test_acc1"] <= 1 and result["bytes"].keys() == set(result["steps_by_phase"])
