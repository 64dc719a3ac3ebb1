"""`prelora report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(output: Annotated[Path, typer.Argument(help="output folder of a run", show_default=False)]) -> None:
    """Print the summary of the run in OUTPUT.

    For each phase it lists predicted and measured bytes, step time, loss, accuracy, and why the phase began.
    """
    from prelora_ds.reporting.table import print_report
    from prelora_ds.run.folder import RunFolder

    print_report(RunFolder(output))
