"""What a user sees while it trains: plain lines, or a bar on a real (pseudo-)terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

import pytest

from prelora_ds.reporting.progress import TrainProgress


def row(step: int, **more: float) -> dict[str, object]:
    return {"step": step, "epoch": step / 2, "phase": "warmup", "train/loss": 1.25, "img_s": 4321.0, **more}


def test_plain_lines_name_time_step_epoch_phase_loss_rate_and_what_remains(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TrainProgress(4, shown=True)
    progress.step(row(1))
    progress.step(row(2))  # sooner than ten seconds after: no line
    progress.say("a window closed")
    progress.step(row(4, **{"val/acc1": 0.9694}))
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    first, said, last = (line[20:] for line in lines)
    assert re.fullmatch(r"step 1/4  epoch 0\.5  warmup loss 1\.2500  4\.32e\+03 img/s  ETA \d+ s", first)
    assert said == "a window closed"
    assert re.fullmatch(r"step 4/4  epoch 2\.0  warmup loss 1\.2500  4\.32e\+03 img/s  acc1 96\.94%  ETA 0 s", last)


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TrainProgress(4, shown=False)
    progress.step(row(4))
    progress.say("a window closed")
    progress.close()
    assert capsys.readouterr().out == ""


def test_a_bar_on_a_terminal() -> None:
    script = textwrap.dedent("""
        from prelora_ds.reporting.progress import TrainProgress
        progress = TrainProgress(4, shown=True)
        for step in (1, 2, 3, 4):
            progress.step({"step": step, "epoch": 1.0, "phase": "lora", "train/loss": 1.25, "img_s": 4321.0})
            progress.say(f"[{step}] said")
        progress.close()
    """)
    ours, theirs = os.openpty()
    child = subprocess.Popen([sys.executable, "-c", script], stdout=theirs, stderr=theirs,
                             env=os.environ | {"TERM": "xterm", "COLUMNS": "120"})
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # EIO: the other end is closed
        pass
    os.close(ours)
    assert child.wait(timeout=60) == 0, shown
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    for step in (1, 2, 3, 4):
        assert f"[{step}] said" in text
    assert "lora   loss 1.2500  4.32e+03 img/s" in text and "100%" in text and "━" in text
