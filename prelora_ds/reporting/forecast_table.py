"""The tables of `prelora plan`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console

from prelora_ds.reporting.columns import print_columns, print_line

KIND_BYTES = {"weights": "weights", "states": "gradients and optimizer", "activations": "activations", "peak": "peak"}
OWNERS = ("weights", "gradients", "masters", "moments", "buckets", "activations")


def _ranks(row: dict[str, Any]) -> str:
    return "-".join(str(rank) for rank in sorted({*row["ranks"][:1], *row["ranks"][-1:]})) or "-"


def _share(row: dict[str, Any], what: str) -> str:
    active = row["active"]
    return "-" if active is None else f"{active[what] / active[f'{what}_in_all']:.0%}"


def _merges(row: dict[str, Any], key: str) -> str:
    return "-" if row["merge"] is None or row["merge"][key] is None else f"{row['merge'][key]:.3g}"


# What only some phases have: label -> the cell of a row, "-" for a phase without it.
DETAILS: dict[str, Callable[[dict[str, Any]], str]] = {
    "adapter rank": _ranks,
    "adapters training at a time": partial(_share, what="adapters"),
    "parameters training at a time": partial(_share, what="parameters"),
    "merges per epoch": partial(_merges, key="per_epoch"),
    "merge, s": partial(_merges, key="seconds"),
    "weights below adapters": lambda row: row["base_dtype"] or "-",
}
FITS = {True: "yes", False: "no", None: "-"}


def print_forecast(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the result of `predict_run`, with the source of the numbers of images and classes."""
    console = console or Console()
    rows = result["rows"]
    unit, factor = ("GiB", 2**30) if max(row["peak_bytes"] for row in rows) > 2**28 else ("MiB", 2**20)
    memory = [*OWNERS, "peak"]
    if any(row["host_bytes"] for row in rows):
        memory.append("host")
    labels = [*(f"{owner}, {unit}" for owner in memory), "fits", "largest micro-batch", "step, ms", "epoch, min"]
    details = {label: cell for label, cell in DETAILS.items() if any(cell(row) != "-" for row in rows)}

    print_line(console, f"{result['recipe']}, predicted: {result['hosts']} x {result['gpus_per_host']} "
                        f"{result['gpu']}, micro-batch {result['micro_batch_size']} x {result['grad_accum_steps']}; "
                        "memory per rank")
    for stage in dict.fromkeys(map(_stage, rows)):
        configured = " (configured)" if stage == result["configured_stage"] else ""
        print_line(console, f"\nZeRO {stage}{configured}")
        columns = [(row["phase"], [*(cell(row) for cell in details.values()), *_cells(row, memory, factor)])
                   for row in rows if _stage(row) == stage]
        print_columns(console, [*details, *labels], columns)
        for run in result["runs"]:
            if _stage(run) == stage:
                print_line(console, _sentence(run))

    rates = result["rates"]
    source = rates["source"] if rates else \
        "no rates for this machine: run `prelora calibrate RECIPE FILE`, then pass --calibration FILE"
    for line in ("", f"images per epoch: {result['images']:,} ({result['images_from']})",
                 f"classes: {result['labels']:,} ({result['labels_from']})", f"time: {source}", *result["notes"]):
        print_line(console, line)


def print_kinds(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the result of `predict_kinds`: a column per kind, then a line per reason for which kinds are refused."""
    console = console or Console()
    offered = [row for row in result["kinds"] if row["refused"] is None]
    print_line(console, f"{result['recipe']}, predicted: phase {result['phase']} with each kind of adapter, ZeRO "
                        f"{result['stage']}, {result['hosts']} x {result['gpus_per_host']} {result['gpu']}; memory per "
                        "rank")
    if offered:
        unit, factor = ("GiB", 2**30) if max(row["peak_bytes"] for row in offered) > 2**28 else ("MiB", 2**20)
        labels = ["adapter rank", "parameters of adapters", "parameters that train",
                  *(f"{words}, {unit}" for words in KIND_BYTES.values()), "GFLOP per image", "step, ms"]
        print_columns(console, labels, [(row["kind"], _cells_of_kind(row, factor)) for row in offered])
    for phase in dict.fromkeys(row["slower_than"] for row in offered if row["slower_than"] is not None):
        slow = ", ".join(row["kind"] for row in offered if row["slower_than"] == phase)
        print_line(console, f"slower than a step of full training (phase {phase}): {slow}. They save memory, not time.")
    names: dict[tuple[str, str], list[str]] = {}
    for row in result["kinds"]:
        if row["refused"] is not None:
            names.setdefault((row["refused"], row["remedy"]), []).append(row["kind"])
    for (reason, remedy), kinds in names.items():
        print_line(console, f"refused: {', '.join(kinds)}: {reason}. Instead, {remedy}.")


def _cells_of_kind(row: dict[str, Any], factor: int) -> list[str]:
    memory = [f"{row[f'{what}_bytes'] / factor:.3f}" for what in KIND_BYTES]
    step = "-" if row["step_s"] is None else f"{row['step_s'] * 1e3:.1f}"
    return [_ranks(row), f"{row['adapter_parameters']:,}", f"{row['trainable_share']:.2%}", *memory,
            f"{row['gflop_per_image']:.0f}", step]


def _stage(row: dict[str, Any]) -> str:
    return f"{row['stage']} with offload" if row["offload_optimizer"] else str(row["stage"])


def _cells(row: dict[str, Any], memory: list[str], factor: int) -> list[str]:
    cells = [f"{row[f'{owner}_bytes'] / factor:.2f}" for owner in memory]
    cells.append(FITS[row["fits"]])
    cells.append("-" if row["largest_micro_batch"] is None else str(row["largest_micro_batch"]))
    cells.append("-" if row["step_s"] is None else f"{row['step_s'] * 1e3:.1f}")
    cells.append("-" if row["epoch_s"] is None else f"{row['epoch_s'] / 60:.1f}")
    return cells


def _sentence(run: dict[str, Any]) -> str:
    """Hours, jobs and merges of the run: where tests end its phases, with the earliest switch and without one."""
    parts = []
    never = " if no test ever passes" if run["earliest"] else ""
    for key, words in (("earliest", " if every test passes as early as it can"), ("never", never)):
        if run[key]:
            counts = {} if run[key]["jobs"] is None else {"jobs": run[key]["jobs"]}
            counts |= {f"merges in {phase}": count for phase, count in run[key]["merges"].items()}
            counted = ", ".join(f"{what}: {count}" for what, count in counts.items())
            parts.append(f"{run[key]['hours']:.3g} h{f' ({counted})' if counted else ''}{words}")
    return "The run takes " + ", ".join(parts) + "."
