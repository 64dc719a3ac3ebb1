"""`prelora checkpoints`."""

from __future__ import annotations

from pathlib import Path

import typer

from prelora_ds.errors import ConfigError


def checkpoints(run: Path) -> None:
    """The checkpoints of RUN, newest first, each verified; exit code 1 if one is broken."""
    from prelora_ds.run.checkpoints.checkpoint_folder import describe, list_checkpoints
    from prelora_ds.run.folder import RunFolder

    found = list_checkpoints(RunFolder(run).checkpoints)
    if not found:
        raise ConfigError("RUN", str(run), "has no checkpoints", "name the run.output_dir of a run")
    broken = False
    for folder in found:
        line = describe(folder)
        typer.echo(line)
        broken |= line.startswith(f"{folder.name}  BROKEN: ")
    if broken:
        raise typer.Exit(1)
