"""The summary of a run, made from the files in its output folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from rich.console import Console

from prelora_ds.errors import ConfigError
from prelora_ds.reporting.columns import print_columns, print_line
from prelora_ds.reporting.history import (
    OWNERS,
    Bytes,
    End,
    Event,
    Resume,
    Started,
    Step,
    find_logs,
    parse_event,
    parse_step,
)
from prelora_ds.run.accuracy import StoredAccuracy, read_accuracy
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import stream_lines


def phase_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """Return one row per phase of the run in ``folder``.

    A row has epochs, steps, trainable parameters, bytes, seconds per step, loss, accuracy, and why the phase began.
    Raises ConfigError when there is no run, or its logs cannot be understood.
    """
    return _rows(*_read(folder))


def _read(folder: RunFolder) -> tuple[list[Step], list[Event]]:
    metrics, logged = find_logs(folder)
    steps = [parse_step(row, metrics, number) for number, row in stream_lines(metrics, _pass_by)]
    events = [parse_event(row, logged, number) for number, row in stream_lines(logged, _pass_by)]
    if not steps:
        raise ConfigError("RUN", str(folder.path), "contains a run that has not logged a step yet",
                          "try again later, or start the run again if it has ended")
    if not any(isinstance(event, Started) for event in events):
        raise ConfigError("RUN", str(folder.path), f"its {logged.name} does not state when a phase began",
                          "restore that file; checkpoints and model are not affected")
    return steps, events


def _pass_by(error: ConfigError) -> None:
    """Say which damaged line of a log is left out."""
    print(f"warning: {error.value}: {error.problem}; it is left out", file=sys.stderr)


def _rows(steps: Sequence[Step], events: Sequence[Event]) -> list[dict[str, Any]]:
    plans = [event for event in events if isinstance(event, Started)]
    # A run that begins with a checkpoint of another run has only its own steps.
    begun = events[0].step if isinstance(events[0], Resume) else 0
    epochs_per_step = steps[-1].epoch / steps[-1].step
    rows = []
    for i, plan in enumerate(plans):
        before = max(plan.step, begun)
        last = plans[i + 1].step if i + 1 < len(plans) else steps[-1].step
        phase_steps = [s for s in steps if plan.step < s.step <= last]
        trained = [s for s in phase_steps if s.step_s is not None]
        step_s = [s.step_s for s in phase_steps if s.step_s is not None]
        measured = next((e for e in events if isinstance(e, Bytes) and plan.step < e.step <= last), None)
        evaluated = [s.acc1 for s in phase_steps if s.acc1 is not None]
        rows.append(
            {
                "phase": plan.phase,
                "first_step": before + 1,
                "last_step": last,
                "epochs": (phase_steps[-1].step - before) * epochs_per_step if phase_steps else 0.0,
                "trainable_parameters": plan.trainable_parameters,
                "predicted": measured and measured.predicted,
                "measured": measured and measured.measured,
                "step_s": median(step_s) if step_s else None,
                "data_s": median(s.data_s or 0.0 for s in trained) if trained else None,
                "loss": trained[-1].loss if trained else None,
                "acc1": evaluated[-1] if evaluated else None,
                "reason": plan.reason,
                "switch_s": None if plan.switch is None else plan.switch.seconds,
            }
        )
    return rows


def print_report(folder: RunFolder, console: Console | None = None) -> None:
    """Print the summary of the run in ``folder``, with bytes of rank 0 at the end of a backward pass.

    Raises ConfigError as `phase_rows` does, and for a model/accuracy.json that cannot be understood.
    """
    console = console or Console()
    steps, events = _read(folder)
    rows = _rows(steps, events)
    notes = [*_notes(rows, events), *_accuracy_note(folder, events)]

    print_line(console, f"{folder.path}: memory per rank at the end of a backward pass, predicted / measured")
    lines = _lines(rows)
    columns = [(row["phase"], [cells[i] for _, cells in lines]) for i, row in enumerate(rows)]
    print_columns(console, [label for label, _ in lines], columns)
    for line in notes:
        print_line(console, line)


def _notes(rows: Sequence[dict[str, Any]], events: Sequence[Event]) -> Iterator[str]:
    for row in rows:
        switch = "" if row["switch_s"] is None else f" (switch: {row['switch_s']:.1f} s)"
        yield f"{row['phase']} from step {row['first_step']}: {row['reason']}{switch}"
    for end in events:
        if isinstance(end, End):
            yield f"peak resident memory per rank: {max(end.peak_rss_bytes) / 2**30:.2f} GiB"


def _accuracy_note(folder: RunFolder, events: Sequence[Event]) -> Iterator[str]:
    """Yield the last result of `prelora evaluate`, with the data that it was measured on."""
    if not folder.accuracy.is_file():
        return
    result = read_accuracy(folder.accuracy)
    validation = [end.data["data.val"] for end in events if isinstance(end, End) and "data.val" in end.data]
    share = f"{result.correct / result.samples:.2%}"
    yield (f"exported model{_data_of(result, validation[0] if validation else None)}: {result.correct} of "
           f"{result.samples} correct ({share})")


def _data_of(result: StoredAccuracy, validation: str | None) -> str:
    """Name the data of the accuracy. validation: the fingerprint of the run's data.val, or None if it is not known."""
    if result.data is None:
        return " on unnamed data"
    if None in (result.identity, validation):
        return f" on {result.data}"
    whose = "the run's data.val" if result.identity == validation else "which is not the run's data.val"
    return f" on {result.data}, {whose}"


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
