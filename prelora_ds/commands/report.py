"""`prelora report`."""

from __future__ import annotations

from pathlib import Path


def report(output: Path) -> None:
    """The table of the run in OUTPUT: per phase, bytes predicted and measured, times, loss, accuracy, and why."""
    from prelora_ds.reporting.table import print_report
    from prelora_ds.run.folder import RunFolder

    print_report(RunFolder(output))
