"""`prelora diff`: what two runs have in common, and where they part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from prelora_ds.config.changes import differences
from prelora_ds.config.load import load_config
from prelora_ds.errors import ConfigError
from prelora_ds.reporting.columns import print_columns, print_line
from prelora_ds.reporting.history import Step, parse_step
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import stream_lines

# Every run has its own.
OWN = ("run.name", "run.output_dir")
PART = 0.01  # a relative difference of the loss that is reported apart from the first difference at all


def compared_runs(first: RunFolder, second: RunFolder) -> dict[str, Any]:
    """Compare two runs, ready for JSON: config by key, finals, and the first steps at which their losses differ.

    Raises ConfigError if one of them is not a run, or if its files cannot be understood.
    """
    configs = [load_config(_config(folder), recipe_key="RUN").model_dump(mode="json") for folder in (first, second)]
    notes: list[str] = []
    steps = [_steps(folder, notes) for folder in (first, second)]
    return {
        "runs": [str(first.path), str(second.path)],
        "config": [{"key": key, "values": [old, new]} for key, old, new in differences(*configs) if key not in OWN],
        "finals": [_finals(rows) for rows in steps],
        **_first_differences(*steps),
        "notes": notes,
    }


def _steps(folder: RunFolder, notes: list[str]) -> list[Step]:
    """The logged steps; a damaged line is left out and noted."""
    lines = stream_lines(folder.metrics, lambda error: notes.append(f"{error.value}: {error.problem}; it is left out"))
    return [parse_step(row, folder.metrics, number) for number, row in lines]


def _config(folder: RunFolder) -> str:
    if not folder.has_run():
        raise ConfigError("RUN", str(folder.path), "does not contain a run", "pass the run.output_dir of a run")
    return str(folder.config)


def _finals(steps: Sequence[Step]) -> dict[str, Any]:
    accuracies = [step.acc1 for step in steps if step.acc1 is not None]
    losses = [step.loss for step in steps if step.loss is not None]
    return {
        "steps": steps[-1].step if steps else 0,
        "epochs": steps[-1].epoch if steps else 0.0,
        "loss": losses[-1] if losses else None,
        "acc1": accuracies[-1] if accuracies else None,
        "best_acc1": max(accuracies, default=None),
    }


def _first_differences(first: Sequence[Step], second: Sequence[Step]) -> dict[str, Any]:
    """Compare the losses of all steps for which both runs have logged one, or one of them has and the other a NaN."""
    mine = {step.step: step.loss for step in first}
    theirs = {step.step: step.loss for step in second}
    for step in [step for step in mine.keys() & theirs.keys() if mine[step] is None and theirs[step] is None]:
        del mine[step]
    common = sorted(mine.keys() & theirs.keys())
    different = [step for step in common if mine[step] != theirs[step]]
    parted = [step for step in different if _relative(mine[step], theirs[step]) >= PART]
    before = [step for step in common if not different or step < different[0]]
    return {
        "common_steps": len(common),
        "identical_through": before[-1] if before else None,
        "first_difference": different[0] if different else None,
        "first_difference_of_1_percent": parted[0] if parted else None,
    }


def _relative(a: float | None, b: float | None) -> float:
    """The difference relative to the larger of the two; 1 if only one of them is a number."""
    if a is None or b is None:
        return 1.0
    return abs(a - b) / max(abs(a), abs(b))


def print_comparison(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of `compared_runs`."""
    console = console or Console()
    for row in result["config"]:
        old, new = row["values"]
        print_line(console, f"{row['key']}: {old!r} and {new!r}")
    if not result["config"]:
        print_line(console, "The configs are equal, except for name and output folder.")

    labels = ["steps", "epochs", "training loss", "top-1", "best top-1"]
    columns = [(name, _cells(finals)) for name, finals in zip("AB", result["finals"], strict=True)]
    print_line(console, f"A: {result['runs'][0]}, B: {result['runs'][1]}")
    print_columns(console, labels, columns)
    print_line(console, _sentence(result))
    for note in result["notes"]:
        print_line(console, f"note: {note}")


def _cells(finals: Mapping[str, Any]) -> list[str]:
    accuracies = ["-" if finals[key] is None else f"{finals[key]:.2%}" for key in ("acc1", "best_acc1")]
    loss = "-" if finals["loss"] is None else f"{finals['loss']:.4f}"
    return [str(finals["steps"]), f"{finals['epochs']:.1f}", loss, *accuracies]


def _sentence(result: Mapping[str, Any]) -> str:
    if not result["common_steps"]:
        return "The runs have not logged a loss at a common step."
    same = result["identical_through"]
    start = "The losses differ from the first common step on" if same is None else f"identical through step {same}"
    if result["first_difference"] is None:
        return f"{start}, the last one that both have logged."
    parted = result["first_difference_of_1_percent"]
    by_one = "never by 1 %" if parted is None else f"by 1 % or more first at step {parted}"
    return f"{start}; the losses differ first at step {result['first_difference']}, {by_one}."
