"""`prelora watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.commands.output import signals_as_exits

NO_RUN_EXIT_CODE = 3


def watch(
    outputs: Annotated[list[Path], typer.Argument(
        metavar="RUN...", help="output folders of runs", show_default=False)],
    once: Annotated[bool, typer.Option(
        "--once", help="print the status and exit; with 3 if a folder has no run")] = False,
    json: Annotated[bool, typer.Option("--json", help="print each status as a line of JSON")] = False,
    every: Annotated[float, typer.Option(min=1.0, help="seconds between two looks at the files")] = 2.0,
) -> None:
    """Show how runs are doing, until they have finished: phase, loss, the switch test, speed, memory and time left.

    It only reads files, also of a run on other hosts. A run that renews its heartbeat is alive, however old its last
    logged step is.

    Example: prelora watch out/digits_demo --once
    """
    from prelora_ds.reporting.watch_view import show_once
    from prelora_ds.reporting.watch_view import watch as show
    from prelora_ds.run.folder import RunFolder

    folders = [RunFolder(path) for path in outputs]
    if once:
        if not show_once(folders, as_json=json):
            raise typer.Exit(NO_RUN_EXIT_CODE)
        return
    try:
        with signals_as_exits():
            show(folders, every_s=every, as_json=json)
    except KeyboardInterrupt:
        raise typer.Exit from None
