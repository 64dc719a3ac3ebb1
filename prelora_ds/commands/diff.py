"""`prelora diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.commands.options import AsJson
from prelora_ds.commands.output import print_json


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="output folder of a run", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="output folder of another run", show_default=False)],
    json: AsJson = False,
) -> None:
    """Compare two runs: config by key, final results, and the first step at which their losses differ.

    Example: prelora diff out/first out/second
    """
    from prelora_ds.reporting.compare import compared_runs, print_comparison
    from prelora_ds.run.folder import RunFolder

    result = compared_runs(RunFolder(first), RunFolder(second))
    if json:
        print_json(result)
    else:
        print_comparison(result)
