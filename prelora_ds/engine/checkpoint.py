"""Slices on disk: each rank writes its own part as safetensors."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file

from prelora_ds.engine.state import EngineState


def save_slices(state: EngineState, names: Iterable[str], folder: Path, rank: int, world_size: int) -> Path:
    """Write this rank's fp32 slices of ``names``; the metadata holds where each slice starts in its parameter."""
    folder.mkdir(parents=True, exist_ok=True)
    mine = {name: state.slices[name] for name in names if name in state.slices}
    path = folder / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
    partial = path.with_suffix(".partial")
    save_file({name: s.value for name, s in mine.items()}, partial,
              metadata={name: str(s.start) for name, s in mine.items()})
    with open(partial, "rb") as written:
        os.fsync(written.fileno())
    partial.replace(path)
    return path
