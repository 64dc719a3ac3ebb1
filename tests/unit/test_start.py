"""What the start of a run prints before training."""

from __future__ import annotations

import re

import pytest

from prelora_ds.config.load import load_config
from prelora_ds.core.schedule import Timeline
from prelora_ds.start import warn_of_a_short_run

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.mark.parametrize(("warmup", "printed"), [
    (4, ""),
    (20, STAMP + r"warning: optimizer\.warmup = 20 steps is longer \(20 steps\) than the run \(10 steps\): .*\n")])
def test_a_warm_up_longer_than_the_run_prints_a_warning_with_the_time(
        warmup: int, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("launch/recipes/vit_tiny_debug.yaml", [
        f"optimizer.warmup={warmup} steps", "train.duration=10 steps", "run.output_dir=o", "data.train=t",
        "data.val=v"])
    timeline = Timeline(64, config.train.global_batch_size, config.train.duration)
    warn_of_a_short_run(config, timeline)
    assert re.fullmatch(printed, capsys.readouterr().out)
