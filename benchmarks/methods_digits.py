"""Does each method train a small ViT on the digits about as well as full training does?

    python benchmarks/methods_digits.py            # make test-methods: each recipe digits_* once, about 10 minutes
    python benchmarks/methods_digits.py --seeds 3
    python benchmarks/methods_digits.py --recipes digits_full digits_relora

Every recipe runs like a user's: two ranks under DeepSpeed's launcher at ZeRO 2, one run after another. Each run must
walk through all phases of its recipe, end the phases with a test by this test, and log its merges and its choices of
adapters. Goal: the accuracy, as a mean over the seeds, is at most 2 points below that of `digits_full`.

With all recipes the result is recorded in benchmarks/results.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from harness import ROOT, print_table, record

sys.path.insert(0, str(ROOT / "tests"))
from support.launch import launch

from prelora_ds.config.load import load_config
from prelora_ds.core.duration import Duration
from prelora_ds.data.shards.writer import write_digits
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import read_lines

RECIPES = ROOT / "launch" / "recipes"
FULL = "digits_full"
# digits_demo is another model, and `make demo` runs it.
NAMES = (FULL, *sorted(path.stem for path in RECIPES.glob("digits_*.yaml") if path.stem not in (FULL, "digits_demo")))
POINTS = 2.0
SECONDS = 120
LAST = 15  # steps, about an epoch, over which the training loss is averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--recipes", nargs="+", choices=NAMES, default=list(NAMES))
    args = parser.parse_args()
    names = [FULL, *(name for name in args.recipes if name != FULL)]

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "digits"
        write_digits(shards)
        for seed in range(args.seeds):
            for name in names:
                rows.append(one_run(name, seed, shards, Path(folder) / f"{name}-{seed}"))
                print_table(rows[-1:], f"run {len(rows)} of {args.seeds * len(names)}")

    print_table(rows, "Methods on the digits")
    accuracy = {name: mean(row["accuracy, %"] for row in rows if row["recipe"] == name) for name in names}
    below = {name: accuracy[FULL] - value for name, value in accuracy.items()}
    mistakes = [f"{row['recipe']}, seed {row['seed']}: {row['mistakes']}" for row in rows if row["mistakes"]]
    mistakes += [f"{name}: {points:.2f} points below {FULL}" for name, points in below.items() if points > POINTS]
    summary = [{"recipe": name, "accuracy, %": accuracy[name], "points below full": below[name],
                "loss": mean(row["loss"] for row in rows if row["recipe"] == name)} for name in names]
    print_table(summary, f"Means of {args.seeds} seed(s)")
    if set(names) == set(NAMES):
        record(
            "methods_digits",
            {f"accuracy_{name}": round(value, 2) for name, value in accuracy.items()} | {
                "largest_points_below_full": round(max(below.values()), 2),
                "limit_points_below_full": POINTS,
                "runs": len(rows),
                "mistakes": len(mistakes),
                "runs_over_120_s": sum(row["seconds"] > SECONDS for row in rows),
            },
            rows,
            "2 ranks, gloo, ZeRO 2. accuracy: top-1 on the 360 validation images at the end of the run, so an image is "
            f"0.28 points. loss: mean training loss of the last {LAST} steps. seconds: the whole command, with its "
            "start; cpu seconds: those of all its processes. load: processes of the machine that wanted a core, in the "
            "minute before the run. phases: the first step of each.",
        )
    if mistakes:
        sys.exit("\n".join(mistakes))


def one_run(name: str, seed: int, shards: Path, out: Path) -> dict[str, Any]:
    """Run a recipe; return its result, with what it did not do as it should under ``mistakes``."""
    recipe = RECIPES / f"{name}.yaml"
    load = os.getloadavg()[0]
    begun, cpu = time.monotonic(), cpu_seconds()
    done = launch(
        "--recipe", recipe.relative_to(ROOT), "--deepspeed_config", "ds_configs/zero2.json", f"run.seed={seed}",
        f"run.output_dir={out}", f"data.train={shards}/train", f"data.val={shards}/val", timeout=1800,
    )
    seconds = time.monotonic() - begun
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    steps, events = read_lines(RunFolder(out).metrics), read_lines(RunFolder(out).events)
    of = {kind: [row for row in events if row["event"] == kind] for kind in ("plan", "merge", "active")}
    accuracies = [row["val/acc1"] for row in steps if row.get("val/acc1") is not None]
    return {
        "recipe": name,
        "seed": seed,
        "accuracy, %": round(100 * accuracies[-1], 2),
        "loss": round(mean(row["train/loss"] for row in steps[-LAST:]), 4),
        "seconds": round(seconds, 1),
        "cpu seconds": round(cpu_seconds() - cpu, 1),
        "load": round(load, 1),
        "phases": ", ".join(f"{row['phase']} {row['step'] + 1}" for row in of["plan"]),
        "merges": len(of["merge"]),
        "choices": sum(row["step"] > of["plan"][-1]["step"] for row in of["active"]),  # without the first of the phase
        "mistakes": "; ".join(mistakes_of(recipe, of)),
    }


def cpu_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def mistakes_of(recipe: Path, events: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return what a run did not do as its recipe says."""
    mistakes = []
    specs = load_config(recipe).specs()
    plans = events["plan"]
    if [row["phase"] for row in plans] != [spec.name for spec in specs]:
        mistakes.append(f"the phases were {[row['phase'] for row in plans]}")
    for spec, following in zip(specs, plans[1:], strict=False):
        if not isinstance(spec.until, Duration) and "Algorithm 1 passed" not in following["reason"]:
            mistakes.append(f"phase {spec.name} ended because {following['reason']}")
    # from: merge merges once more, without an event of its own.
    if any(spec.merge for spec in specs) and not events["merge"]:
        mistakes.append("no merge was logged")
    if any(row["reset_share"] <= 0 for row in events["merge"]):
        mistakes.append("a merge reset no moments")
    if any(spec.selection for spec in specs) and not events["active"]:
        mistakes.append("no choice of adapters was logged")
    return mistakes


if __name__ == "__main__":
    main()
