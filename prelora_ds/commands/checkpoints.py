"""`prelora checkpoints`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.commands.options import AsJson
from prelora_ds.commands.output import print_json
from prelora_ds.errors import ConfigError


def checkpoints(
    run: Annotated[Path, typer.Argument(help="output folder of a run", show_default=False)],
    json: AsJson = False,
) -> None:
    """List and verify the checkpoints of RUN, newest first. Exits with 1 if one is broken.

    Example: prelora checkpoints out/digits_demo
    """
    from prelora_ds.core.codec import to_json
    from prelora_ds.run.checkpoints.checkpoint_folder import describe, list_checkpoints
    from prelora_ds.run.folder import RunFolder

    if not run.exists():
        raise ConfigError("RUN", str(run), "does not exist", "pass the run.output_dir of a run")
    folders = list_checkpoints(RunFolder(run).checkpoints)
    if not folders:
        raise ConfigError("RUN", str(run), "has no checkpoints", "pass the run.output_dir of a run")

    found = []
    for folder in folders:
        found.append(describe(folder))
        if not json:
            typer.echo(found[-1].line())
    if json:
        print_json([to_json(each) for each in found])
    if any(each.broken is not None for each in found):
        raise typer.Exit(1)
