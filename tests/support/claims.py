"""Output folders in the states that runs leave behind, and claims of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prelora_ds.config.load import load_config
from prelora_ds.config.tree import Config
from prelora_ds.run.checkpoints.checkpoint_folder import (
    RUN_STATE,
    CheckpointManifest,
    FileRecord,
    commit,
    step_folder,
)
from prelora_ds.run.claim import claim_output
from prelora_ds.run.folder import RunFolder

DATA = {"data.train": "1,437 samples, index 01234567", "data.val": "360 samples, index 89abcdef"}


def config(out: Path, *overrides: str) -> Config:
    """Return the config of a run in ``out``."""
    return load_config(
        "launch/recipes/vit_tiny_debug.yaml",
        [f"run.output_dir={out}", "data.train=t", "data.val=v", *overrides],
    )


def claim(
    out: Path,
    resume: str = "auto",
    *overrides: str,
    data: dict[str, str] | None = None,
    steps: int = 20,
) -> list[Path]:
    """Claim ``out`` for a run that ends at once; return the checkpoints that it may resume from."""
    found = claim_output(RunFolder(out), config(out, *overrides), resume, data or DATA, steps=steps)
    found.lock.release()
    return list(found.resume_candidates)


def checkpoint(run: Path, step: int, *overrides: str, change: Callable[[Any], None] = id) -> Path:
    """Write a checkpoint of ``run`` without weights. change: is called with its state."""
    root = RunFolder(run).checkpoints
    partial = root / f".{step}.partial"
    partial.mkdir(parents=True)
    state = {
        "config": config(run, *overrides).model_dump(mode="json"),
        "data": DATA,
        "run": {"step": step, "phase": {"index": 0, "plan": {"phase": "full"}}},
    }
    change(state)
    (partial / RUN_STATE).write_text(json.dumps(state))
    commit(partial, step_folder(root, step),
           CheckpointManifest(1, 0, "full", {RUN_STATE: FileRecord.of(partial / RUN_STATE)}, step))
    return step_folder(root, step)


def begin(run: Path) -> None:
    """Leave the first event of a run in its folder."""
    (run / "events.jsonl").write_text('{"event": "plan", "step": 0}\n')
