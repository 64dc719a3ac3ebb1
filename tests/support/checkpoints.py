"""Change checkpoints, as if other versions had written them, and build engines from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from prelora_ds.config.load import load_config
from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import needed_in_fp32
from prelora_ds.run.checkpoints.checkpoint_folder import RUN_STATE, CheckpointManifest, FileRecord


def rewrite_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's state.json in place; it verifies as before."""
    state = json.loads((folder / RUN_STATE).read_text())
    change(state)
    (folder / RUN_STATE).write_text(json.dumps(state))
    manifest = CheckpointManifest.load(folder)
    replace(manifest, files={**manifest.files, RUN_STATE: FileRecord.of(folder / RUN_STATE)}).write(folder)


def method_of(run: Path) -> tuple[Config, Layout]:
    """Return the config of a run of the digits, and the layout of its model."""
    from prelora_ds.model.families import find_layout
    from prelora_ds.model.vit import build_model

    config = load_config(run / "config.yaml")
    return config, find_layout(build_model(config.model, 10), config.families())


def engine_of(folder: Path) -> Any:
    """Return a checkpoint of a run of the digits, and the engine that holds its state. Collective."""
    from deepspeed import comm

    from prelora_ds.engine.build import build_engine
    from prelora_ds.run.checkpoints.resume import read_checkpoint

    config, layout = method_of(folder.parents[1])
    checkpoint = read_checkpoint(folder, layout, comm.get_rank(), comm.get_world_size())
    phase = checkpoint.run.phase
    engine = build_engine(config, phase.plan, layout, 10, checkpoint.engine, checkpoint.counters,
                          parked=needed_in_fp32(config.specs(), layout, phase.index))
    return checkpoint, engine
