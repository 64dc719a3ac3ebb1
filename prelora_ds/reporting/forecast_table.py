"""The tables of `prelora plan`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

OWNERS = ("weights", "gradients", "masters", "moments", "buckets", "activations")


def print_forecast(result: dict[str, Any], console: Console | None = None) -> None:
    """Print what `predict_run` returned, with the source of images and classes."""
    console = console or Console(width=150)
    unit, factor = ("GiB", 2**30) if max(row["peak_bytes"] for row in result["rows"]) > 2**28 else ("MiB", 2**20)
    table = Table(title=escape(f"{result['recipe']}, predicted: {result['hosts']} x {result['gpus_per_host']} "
                               f"{result['gpu']}, micro-batch {result['micro_batch_size']} x "
                               f"{result['grad_accum_steps']}, LoRA rank {result['mean_rank']}; {unit} a rank"))
    memory = [*OWNERS, "peak", *(["host"] if any(row["host_bytes"] for row in result["rows"]) else [])]
    for column in ("ZeRO", "phase", *memory, "fits", "largest batch", "step, ms", "epoch, min"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in result["rows"]:
        table.add_row(_stage(row), row["phase"], *(f"{row[f'{c}_bytes'] / factor:.2f}" for c in memory),
                      {True: "yes", False: "no", None: "-"}[row["fits"]],
                      "-" if row["largest_micro_batch"] is None else str(row["largest_micro_batch"]),
                      *("-" if row[key] is None else f"{row[key] * per_unit:.1f}"
                        for key, per_unit in (("step_s", 1e3), ("epoch_s", 1 / 60))))
    console.print(table)
    for run in result["runs"]:
        console.print(f"ZeRO {_stage(run)}: " + "; ".join(_sentence(name, run[name]) for name in ("earliest", "never")
                                                          if run[name]), highlight=False)
    for line in (f"images of an epoch: {result['images']:,} ({result['images_from']})",
                 f"classes: {result['labels']:,} ({result['labels_from']})"):
        console.print(line, highlight=False, markup=False)
    rates = result["rates"]
    source = rates["source"] if rates else "nothing is known of this machine: calibrate it (`prelora calibrate`)"
    for line in (f"time: {source}", *result["notes"]):
        console.print(line, highlight=False, markup=False)


def _stage(row: dict[str, Any]) -> str:
    return f"{row['stage']}{' offload' if row['offload_optimizer'] else ''}"


def _sentence(name: str, run: dict[str, Any]) -> str:
    jobs = "" if run["jobs"] is None else f", {run['jobs']} jobs"
    return {"earliest": "with every test passing as early as it can", "never": "with no test ever passing"}[name] + (
        f" {run['hours']:.3g} h{jobs}")
