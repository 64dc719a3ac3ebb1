"""`benchmarks/gpu.py` rehearsed on the CPU with a tiny model: its table, its decisions and the calibration."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from support.launch import ROOT

from prelora_ds.cost.machines import read_calibration
from prelora_ds.cost.timing import KINDS

sys.path.insert(0, str(ROOT / "benchmarks"))  # as for the script itself
import gpu
import gpu_ranks
import modelled_steps

sys.path.remove(str(ROOT / "benchmarks"))  # it has a module `ranks`, which would hide tests/ranks


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder and the output of a rehearsal."""
    out = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--minutes", "1", "--out", str(out)]
    unlaunched = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240,
                           env=unlaunched | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return out, ended.stdout


def test_the_result_has_every_case_and_figures_that_agree(rehearsed):
    result = json.loads((rehearsed[0] / "gpu_cpu.json").read_text())
    assert [gpu.Case(**row["case"]) for row in result["rows"]] == gpu.cases(1, tiny=True)
    for row in result["rows"]:
        micro = result["figures"]["micro_batch"]
        assert row["img/s"] == pytest.approx(1000 * micro / row["step ms"])
        assert 0 < row["enqueue / backward"] <= 1 and row["kernels"] > 0
    assert result["figures"]["device"] == "CPU" and result["figures"]["images/s of a data worker"] > 0


def test_the_calibration_is_one_that_auto_and_plan_read(rehearsed):
    rates, memory_gib = read_calibration(rehearsed[0] / "gpu_cpu_rates.json", "machine.calibration")
    assert rates.measured and set(rates.seconds) == set(KINDS) and memory_gib > 0
    # On a busy machine the steps of a tiny model are mostly noise, and the fit may leave out any one kind of work.
    # What it keeps explains each step that was measured.
    samples = json.loads((rehearsed[0] / "gpu_cpu_rates.json").read_text())["samples"]
    assert min(rates.seconds.values()) >= 0 and len(samples) == 8
    assert all(sample["measured_s"] > 0 and sample["fitted_s"] > 0 for sample in samples)


def test_the_decisions_are_printed_with_their_reasons(rehearsed):
    lines = rehearsed[1].splitlines()
    for key in ("lora.mode: ", "phases.lora.zero_stage: 2 ("):
        assert any(line.startswith(key) for line in lines), rehearsed[1]


def row(case: gpu.Case, ms: float) -> dict:
    return {"case": vars(case), "step ms": ms}


def test_a_setting_is_chosen_only_if_it_is_clearly_faster():
    rows = [row(gpu.Case("lora", 2), 100.0), row(gpu.Case("lora", 2, "merged"), 98.0), row(gpu.Case("lora", 0), 90.0),
            row(gpu.Case("full", 2), 200.0), row(gpu.Case("full", 2, overlap=True), 150.0)]
    decided = gpu.decisions(rows)
    assert decided["lora.mode"].startswith("branch") and decided["overlap_comm"].startswith("true")
    assert decided["phases.lora.zero_stage"] == "0 (90.0 ms at 0, 100.0 ms at 2)"
    assert "train.reduce_dtype" not in decided, "it was not measured"
    rows.append(row(gpu.Case("full", 2, overlap=True, reduce="bf16"), 149.0))
    assert gpu.decisions(rows)["train.reduce_dtype"].startswith("fp32 (a full step takes 149.0 ms with bf16")
    rows[1] = row(gpu.Case("lora", 2, "merged"), 90.0)
    assert gpu.decisions(rows)["lora.mode"].startswith("merged (a lora step takes 90.0 ms with merged, 100.0 ms with")


def test_on_several_gpus_overlap_is_measured_too_and_no_case_twice():
    for world in (1, 4):
        cases = gpu.cases(world)
        assert len(set(cases)) == len(cases) <= 20
        assert any(case.overlap for case in cases) == (world > 1)


def test_time_that_is_covered_twice_counts_once():
    assert gpu_ranks.union([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert gpu_ranks.union([]) == 0


def test_the_table_of_modelled_steps_on_the_page_is_that_of_the_model():
    page = (ROOT / "docs/first-gpu.md").read_text()
    assert modelled_steps.table() in page
    assert "**Every figure in this table is modelled, not measured**" in page


def test_every_check_of_the_page_has_a_test_and_every_test_is_on_the_page():
    page = re.findall(r"^\| (G\d+) \|", (ROOT / "docs/first-gpu.md").read_text(), re.MULTILINE)
    tests = [re.findall(r"def test_(g\d+)_", path.read_text()) for path in (ROOT / "tests/gpu").glob("test_*.py")]
    assert {number.upper() for numbers in tests for number in numbers} == set(page)
    assert page == [f"G{number}" for number in range(1, 20)]
