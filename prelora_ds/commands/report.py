"""`prelora report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.commands.output import refuse_url, tell


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="output folders of runs", show_default=False)],
    out: Annotated[Path | None, typer.Option(
        "--out", show_default=False, help="write a report with page, figures and data to this new folder")] = None,
) -> None:
    """Print the summary of each RUN, or write a report that compares them to the folder --out.

    For each phase the summary lists predicted and measured bytes, step time, loss, accuracy, and why the phase began.
    """
    from prelora_ds.run.folder import RunFolder

    folders = [RunFolder(run) for run in runs]
    if out is None:
        from prelora_ds.reporting.table import print_report

        for folder in folders:
            print_report(folder)
        return

    from prelora_ds.reporting.report.writing import write_report

    refuse_url(out, "--out")
    for line in write_report(folders, out):
        tell(line)
