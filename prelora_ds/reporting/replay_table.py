"""Print what `prelora replay` has decided, and write its grid as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from prelora_ds.console import size
from prelora_ds.reporting.columns import print_columns, print_line

RESULTS = ("step", "epoch", "hours_saved", "closest")  # the keys of a row of the grid that are not parameters


def print_replay(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the decisions of the first combination of parameters, and a table of all if there are several."""
    console = console or Console()
    if not result["decisions"]:
        print_line(console, _never(result["grid"][0]))
    for row in result["decisions"]:
        note = " (extrapolated: the run itself decided otherwise before)" if row["extrapolated"] else ""
        print_line(console, f"{row['phase']} after step {row['step']}, epoch {row['epoch']:.1f}{note}: {row['reason']}")
    if result["decisions"]:
        labels = ["step", "epoch", "ranks", "trainable parameters", "share of all", "memory per rank", "step, ms"]
        print_columns(console, labels, [(row["phase"], _cells(row)) for row in result["decisions"]])
    if len(result["grid"]) == 1 and result["decisions"]:
        cell = result["grid"][0]
        if cell["hours_saved"] is not None:
            print_line(console, f"hours saved, if all steps took as long as those of the first phase: "
                                f"{cell['hours_saved']:.2f}")
        if cell["step"] is None:
            print_line(console, _never(cell))
    if len(result["grid"]) > 1:
        varied = _varied(result["grid"])
        table = Table(*(f"{key}, %" if key in ("tau", "zeta") else key for key in varied),
                      "switch at step", "epoch", "hours saved", "closest, if never")
        for cell in result["grid"]:
            table.add_row(*(_number(cell[key]) for key in varied), *_grid_cells(cell))
        console.print(table)
    if "suggestion" in result:
        found = result["suggestion"]
        print_line(console, "no thresholds pass in this log" if found is None else
                   f"tau {found['tau']:g} and zeta {found['zeta']:g} pass first after step {found['step']}")


def grid_as_csv(result: Mapping[str, Any]) -> str:
    """Return the combinations of parameters as CSV, with what came closest in columns of its own."""
    text = io.StringIO()
    rows = [{**{key: value for key, value in cell.items() if key != "closest"},
             **{f"closest_{key}": value for key, value in (cell["closest"] or {}).items()}} for cell in result["grid"]]
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _varied(grid: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parameters that tell the combinations apart; tau and zeta are always shown."""
    return [key for key in grid[0] if key not in RESULTS
            and (key in ("tau", "zeta") or any(cell[key] != grid[0][key] for cell in grid))]


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cells(row: Mapping[str, Any]) -> list[str]:
    ranks = [rank for layers in row["ranks"].values() for rank in layers.values()]
    shown = f"{min(ranks)}-{max(ranks)}" if ranks else "-"
    seconds = "-" if row["step_s"] is None else f"{row['step_s'] * 1e3:.1f} ({row['step_s_from']})"
    return [str(row["step"]), f"{row['epoch']:.1f}", shown, f"{row['trainable_parameters']:,}",
            f"{row['trainable_share']:.1%}", size(row["bytes"]), seconds]


def _grid_cells(cell: Mapping[str, Any]) -> list[str]:
    saved = "-" if cell["hours_saved"] is None else f"{cell['hours_saved']:.2f}"
    if cell["step"] is None:
        return ["never", "-", "-", _closest_text(cell["closest"])]
    return [str(cell["step"]), f"{cell['epoch']:.1f}", saved, "-"]


def _never(cell: Mapping[str, Any]) -> str:
    return f"never (closest: {_closest_text(cell['closest'])})"


def _closest_text(closest: Mapping[str, Any] | None) -> str:
    if closest is None:
        return "no window was tested"
    return f"{closest['what']} {closest['change']:.3g} > {closest['threshold']:g} after step {closest['step']}"
