"""`prelora checkpoints`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.errors import ConfigError


def checkpoints(run: Annotated[Path, typer.Argument(help="output folder of a run", show_default=False)]) -> None:
    """List and verify the checkpoints of RUN, newest first. Exits with 1 if one is broken."""
    from prelora_ds.run.checkpoints.checkpoint_folder import describe, list_checkpoints
    from prelora_ds.run.folder import RunFolder

    if not run.exists():
        raise ConfigError("RUN", str(run), "does not exist", "pass the run.output_dir of a run")
    folders = list_checkpoints(RunFolder(run).checkpoints)
    if not folders:
        raise ConfigError("RUN", str(run), "has no checkpoints", "pass the run.output_dir of a run")

    any_broken = False
    for folder in folders:
        line = describe(folder)
        typer.echo(line)
        any_broken |= line.startswith(f"{folder.name}  BROKEN: ")
    if any_broken:
        raise typer.Exit(1)
