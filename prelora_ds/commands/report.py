"""`prelora report`."""

from __future__ import annotations

from pathlib import Path


def report(output: Path) -> None:
    """Print the summary of the run in OUTPUT.

    For each phase it lists predicted and measured bytes, step time, loss, accuracy, and why the phase began.
    """
    from prelora_ds.reporting.table import print_report
    from prelora_ds.run.folder import RunFolder

    print_report(RunFolder(output))
