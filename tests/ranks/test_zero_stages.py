"""`benchmarks/zero_stages.py --recipe` under DeepSpeed's launcher: its table, and a setting that fails."""

from __future__ import annotations

import json

import pytest
from support.launch import launch

PHASES = ["full", "warmup", "lora"]


@pytest.mark.long
@pytest.mark.timeout(600)  # each setting imports everything anew
def test_each_stage_is_measured_in_each_phase_and_a_setting_that_fails_is_named_and_passed_by(shards, tmp_path):
    """Stage 0 does not accumulate gradients, and this batch has two micro-batches per rank."""
    done = launch(
        "--recipe", "launch/recipes/vit_tiny_debug.yaml", "--settings", "0", "2", "3", "--steps", "2",
        "--out", tmp_path, "--", f"data.train={shards / 'train'}", f"data.val={shards / 'val'}",
        "train.global_batch_size=64", "train.micro_batch_size=16", script="benchmarks/zero_stages.py", timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "zero_stages_vit_tiny_debug.json").read_text())

    failed, *rows = result["rows"]
    assert (failed["ZeRO"], failed["phase"]) == ("0", "full")
    assert "accumulat" in failed["failed"] and failed["failed"].startswith("rank ")
    assert [(row["ZeRO"], row["phase"]) for row in rows] == [
        (setting, phase) for setting in ("2", "3") for phase in PHASES]
    for row in rows:
        assert row["states off by"] < 0.02 and row["img/s"] == pytest.approx(64 / row["step s"])
        assert row["step s"] >= row["forward s"] + row["backward s"]
    masters = [row["masters"] for row in rows if row["ZeRO"] == "2"]
    assert masters[2] < masters[0], "LoRA has no masters of frozen weights"
    figures = result["figures"]
    assert (figures["ranks"], figures["hosts"], figures["failed"]) == (2, 1, ["0"])
    assert list(figures["fastest"]) == PHASES and "zero_stages_vit_tiny_debug.json" in done.stdout
