"""The common part of all benchmarks: interleaved measurements, a table, and a JSON of results.

Run a benchmark from the repository: `python benchmarks/NAME.py`. It prints its table and writes
benchmarks/results/NAME.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests"))  # for the plans and runs of tests/support
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "peft", "prelora_ds")


def record(
    name: str, figures: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], notes: str = "",
    folder: Path = RESULTS,
) -> Path:
    """Write NAME.json into ``folder``: results with machine, versions, commit and command."""
    result = {
        "name": name,
        "figures": dict(figures),
        "rows": [dict(row) for row in rows],
        "notes": notes,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "git": git_state(),
        "machine": machine(),
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print ``rows``; the columns are the keys of all rows in order of appearance."""
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(
            column, justify="right" if any(_is_number(row.get(column)) for row in rows) else "left"
        )
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    # A pipe has no width, and the default of 80 columns would truncate the table.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def interleaved(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each variant by name, one per round.

    A variant returns its own seconds. All variants take turns in each round, and each round begins
    with another one, so that drift of the machine affects all of them equally. A warm-up round
    comes first and is not counted.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        variants[name]()
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(variants[name]())
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each variant."""
    return {name: median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """Return the CPU model, its BF16 products, the cores for this process, the memory, and the accelerator if any."""
    import torch

    from prelora_ds.model.products import lacks_bf16_products

    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "bf16_products": "in fp32" if lacks_bf16_products() else "oneDNN",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "accelerator": accelerator,
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of PACKAGES; None for a package that is not installed."""
    result: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = None
    return result


def git_state() -> dict[str, Any]:
    """Return the commit, and whether the tree differs from it outside of benchmarks/results."""
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(changes)}


def command() -> str:
    """Return the command line, with paths relative to the repository."""
    return " ".join(["python", *map(_relative, sys.argv)])


def _git(*args: str) -> str:
    return subprocess.run(
        ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def _relative(argument: str) -> str:
    key, separator, value = argument.rpartition("=")
    return key + separator + (os.path.relpath(value, ROOT) if os.path.isabs(value) else value)


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if _is_number(value) else str(value)
