"""`prelora report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.commands.options import AsJson
from prelora_ds.commands.output import print_json, refuse_url, signals_as_exits, tell
from prelora_ds.errors import ConfigError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="output folders of runs", show_default=False)],
    out: Annotated[Path | None, typer.Option(
        "--out", show_default=False, help="write a report with page, figures and data to this new folder")] = None,
    json: AsJson = False,
) -> None:
    """Print the summary of each RUN, or write a report that compares them to the folder --out.

    For each phase the summary lists predicted and measured bytes, step time, loss, accuracy, and why the phase began.

    Example: prelora report out/digits_demo --out report
    """
    from prelora_ds.run.folder import RunFolder

    folders = [RunFolder(run) for run in runs]
    if json and out is not None:
        raise ConfigError("--json", True, f"prints a report, and --out {out} writes it", "choose one; "
                          "the folder of --out contains report.json")
    if json:
        from prelora_ds.reporting.report.writing import summarized

        print_json(summarized(folders))
        return
    if out is None:
        from prelora_ds.reporting.table import print_report

        for folder in folders:
            print_report(folder)
        return

    from prelora_ds.reporting.report.writing import write_report

    refuse_url(out, "--out")
    with signals_as_exits():
        lines = write_report(folders, out)
    for line in lines:
        tell(line)
