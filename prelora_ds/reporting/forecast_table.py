"""The tables of `prelora plan`."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from prelora_ds.reporting.columns import print_columns, print_line

OWNERS = ("weights", "gradients", "masters", "moments", "buckets", "activations")
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

    print_line(console, f"{result['recipe']}, predicted: {result['hosts']} x {result['gpus_per_host']} "
                        f"{result['gpu']}, micro-batch {result['micro_batch_size']} x {result['grad_accum_steps']}, "
                        f"LoRA rank {result['mean_rank']}; memory per rank")
    for stage in dict.fromkeys(map(_stage, rows)):
        configured = " (configured)" if stage == result["configured_stage"] else ""
        print_line(console, f"\nZeRO {stage}{configured}")
        columns = [(row["phase"], _cells(row, memory, factor)) for row in rows if _stage(row) == stage]
        print_columns(console, labels, columns)
        for run in result["runs"]:
            if _stage(run) == stage:
                print_line(console, _sentence(run))

    rates = result["rates"]
    source = rates["source"] if rates else \
        "no rates for this machine: run `prelora calibrate RECIPE FILE`, then pass --calibration FILE"
    for line in ("", f"images per epoch: {result['images']:,} ({result['images_from']})",
                 f"classes: {result['labels']:,} ({result['labels_from']})", f"time: {source}", *result["notes"]):
        print_line(console, line)


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
    """Hours and jobs of the run at the earliest possible switch and without a switch."""
    parts = []
    for key, words in (("earliest", "if every test passes as early as it can"), ("never", "if no test ever passes")):
        if run[key]:
            jobs = "" if run[key]["jobs"] is None else f" (jobs: {run[key]['jobs']})"
            parts.append(f"{run[key]['hours']:.3g} h{jobs} {words}")
    return "The run takes " + ", ".join(parts) + "."
