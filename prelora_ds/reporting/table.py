"""The final table of a run, from the files in its output folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prelora_ds.core.errors import ConfigError
from prelora_ds.metrics import read_lines

OWNERS = ("weights", "gradients", "masters", "moments")


def phase_rows(folder: Path) -> list[dict[str, Any]]:
    """One row a phase of the run in ``folder``: epochs, steps, trainable parameters, bytes, step time, loss, accuracy,
    and why it began. Raises ConfigError when there is no run."""
    if not (folder / "metrics.jsonl").is_file() or not (folder / "plans.jsonl").is_file():
        raise ConfigError("OUTPUT", str(folder), "holds no run", "name the run.output_dir of a run")
    steps, events = read_lines(folder / "metrics.jsonl"), read_lines(folder / "plans.jsonl")
    if not steps:
        raise ConfigError("OUTPUT", str(folder), "holds a run that ended before its first logged step", "run it again")
    plans = [e for e in events if e["event"] == "plan"]
    rows, begun = [], events[0]["step"] if events[0]["event"] == "resume" else 0  # by a run that this one goes on from
    epochs_a_step = steps[-1]["epoch"] / steps[-1]["step"]
    for i, plan in enumerate(plans):
        before = max(plan["step"], begun)
        last = plans[i + 1]["step"] if i + 1 < len(plans) else steps[-1]["step"]
        own = [s for s in steps if plan["step"] < s["step"] <= last and "train/loss" in s]
        measured = next((e for e in events if e["event"] == "bytes" and plan["step"] < e["step"] <= last), None)
        evaluated = [s["val/acc1"] for s in own if "val/acc1" in s]
        rows.append({
            "phase": plan["phase"], "first_step": before + 1, "last_step": last,
            "epochs": (own[-1]["step"] - before) * epochs_a_step if own else 0.0,
            "trainable_parameters": plan["trainable_parameters"],
            "predicted": measured and measured["predicted"], "measured": measured and measured["measured"],
            "step_s": median(s["step_s"] for s in own) if own else None,
            "data_s": median(s["data_s"] for s in own) if own else None,
            "loss": own[-1]["train/loss"] if own else None, "acc1": evaluated[-1] if evaluated else None,
            "reason": plan["reason"], "switch": plan["switch"],
        })
    return rows


def print_report(folder: Path, console: Console | None = None) -> None:
    """Print the table of the run in ``folder``: bytes of rank 0 at the end of a backward pass, predicted / measured."""
    console = console or Console(width=132)
    rows = phase_rows(folder)
    table = Table(title=f"{escape(str(folder))}: bytes per rank at the end of a backward pass, predicted / measured")
    for column in ("", *(row["phase"] for row in rows)):
        table.add_column(column, justify="left" if not column else "right")
    for label, cells in _lines(rows):
        table.add_row(label, *cells)
    console.print(table)
    for line in _notes(folder, rows):
        console.print(line, highlight=False, markup=False)


def _notes(folder: Path, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        switch = f" (switch: {row['switch']['seconds']:.1f} s)" if row["switch"] else ""
        yield f"{row['phase']} from step {row['first_step']}: {row['reason']}{switch}"
    for end in (e for e in read_lines(folder / "plans.jsonl") if e["event"] == "end"):
        yield f"peak resident memory of a rank: {max(end['peak_rss_bytes']) / 2**30:.2f} GiB"
    accuracy = folder / "model" / "accuracy.json"
    if accuracy.is_file():
        result = json.loads(accuracy.read_text())
        yield f"exported model: {result['correct']} of {result['samples']} right, {result['acc1']:.2%}"


def _lines(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    lines = [
        ("epochs", [f"{r['epochs']:.1f}" for r in rows]),
        ("steps", [f"{r['first_step']}-{r['last_step']}" for r in rows]),
        ("trainable parameters", [f"{r['trainable_parameters']:,}" for r in rows]),
    ]
    largest = max((sum(r["measured"].values()) for r in rows if r["measured"]), default=0)
    unit, factor = ("MiB", 2**20) if largest > 2**27 else ("KiB", 2**10)
    for owner in OWNERS:
        lines.append((f"{owner}, {unit}", [_pair(r, [owner], factor) for r in rows]))
    lines.append((f"sum of these, {unit}", [_pair(r, OWNERS, factor) for r in rows]))
    return [*lines,
            ("step, ms (median)", [_number(r["step_s"], 1e3, ".1f") for r in rows]),
            ("waiting for data, ms", [_number(r["data_s"], 1e3, ".1f") for r in rows]),
            ("training loss, last", [_number(r["loss"], 1, ".4f") for r in rows]),
            ("validation top-1, last", [_number(r["acc1"], 100, ".2f", " %") for r in rows])]


def _pair(row: dict[str, Any], owners: Sequence[str], factor: int) -> str:
    if row["predicted"] is None:
        return "-"
    return " / ".join(f"{sum(row[side][o] for o in owners) / factor:,.0f}" for side in ("predicted", "measured"))


def _number(value: float | None, factor: float, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value * factor:{form}}{unit}"
