"""Change checkpoints, as if other versions had written them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from prelora_ds.run.checkpoints.checkpoint_folder import RUN_STATE, CheckpointManifest, FileRecord


def rewrite_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's state.json in place; it verifies as before."""
    state = json.loads((folder / RUN_STATE).read_text())
    change(state)
    (folder / RUN_STATE).write_text(json.dumps(state))
    manifest = CheckpointManifest.load(folder)
    replace(manifest, files={**manifest.files, RUN_STATE: FileRecord.of(folder / RUN_STATE)}).write(folder)
