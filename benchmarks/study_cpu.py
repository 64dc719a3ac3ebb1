"""How many CPU-seconds does a step of each phase of the study take?

    python benchmarks/study_cpu.py     # after `make study`, alone on the machine; about 25 minutes

The runs of the study shared the machine. So each phase of the first seed is measured once more, alone: a fork from the
last checkpoint before the middle of the phase takes STEPS steps, or a whole cycle if it merges, and the CPU time of all
its processes is read before and after them. Where fewer and fewer adapters train, this is done at PLACES points of the
phase. `study.py --summary` then has the CPU-seconds of each phase.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
from harness import ROOT, print_table, record
from study import command_of
from study_results import phases_of, read, result_file, run_folder
from study_settings import FASHION, Study
from support.launch import kill_tree

from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import read_lines

SEED = 0
WARM = 4  # steps that are not measured, at the beginning of a job or of a phase
STEPS = 24
PLACES = 4  # points of a phase in which fewer and fewer adapters train
SECONDS = 300


@dataclass(frozen=True)
class Part:
    """What is measured of a phase: ``length`` steps after each step of ``after``, under the method until its end."""

    setting: str
    phase: str
    method: list[dict[str, Any]]
    after: list[int]
    length: int


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    study = FASHION
    parts = list(parts_of(study))
    if not {("full", "full"), ("exp1", "lora")} <= {(part.setting, part.phase) for part in parts}:
        sys.exit("full and exp1 of the first seed have not finished; make study begins with them")
    measured: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    for part in parts:
        method = json.dumps(part.method)
        if method not in measured:
            measured[method] = [cpu_of_a_step(study, part, step) for step in part.after]
        each = [round(seconds, 4) for seconds in measured[method]]
        rows.append({"setting": part.setting, "phase": part.phase, "CPU-seconds of a step": round(mean(each), 4),
                     "each": each, "after step": part.after, "steps": part.length})
        print(f"{len(rows)} of {len(parts)}: {part.setting}, {part.phase}: {mean(each):.4f} s", flush=True)
    print_table(rows, "CPU-seconds of a step of the study")
    seconds = {(row["setting"], row["phase"]): row["CPU-seconds of a step"] for row in rows}
    full = seconds["full", "full"]
    record("study_cpu", {
        "full_cpu_s": full,
        "exp1_warmup_vs_full": round(seconds["exp1", "warmup"] / full, 3),
        "exp1_lora_vs_full": round(seconds["exp1", "lora"] / full, 3),
    }, rows, f"One rank with one thread, batches of {study.batch}; the loader works in the process of the rank. What "
             "several settings have in common, such as the warm-up of exp1, was measured once.")


def parts_of(study: Study) -> Iterator[Part]:
    """Yield what is to be measured of the settings that have finished.

    Full training is the same in all settings, and is measured in the first.
    """
    for name in study.settings:
        if not result_file(study, name, SEED).exists():
            continue
        method, begins = phases_of(study, name, SEED), 0
        for i, (phase, steps) in enumerate(read(result_file(study, name, SEED))["steps_by_phase"].items()):
            length = int(method[i]["merge"]["every"].split()[0]) if "merge" in method[i] else STEPS
            shrinks = method[i].get("active", {}).get("choose") == "unconverged"
            places = PLACES if shrinks else 1
            first, last = begins + WARM, begins + steps - length
            begins += steps
            if phase != "full" or name == "full":
                yield Part(name, phase, method[: i + 1], [first + (last - first) * (2 * place + 1) // (2 * places)
                                                          for place in range(places)], length)


def cpu_of_a_step(study: Study, part: Part, after: int) -> float:
    """Return the CPU-seconds of a step, as a mean of those that follow step ``after``."""
    folder = RunFolder(run_folder(study, part.setting, SEED))
    before = [path for path in folder.checkpoints.glob("step-*") if int(path.name[5:]) <= after - WARM]
    if not before:
        sys.exit(f"{folder.checkpoints} has no checkpoint to begin with before step {after}")
    with tempfile.TemporaryDirectory() as out:
        command, environ = command_of(
            study, part.setting, SEED, Path(out) / "run", str(max(before)), "train.log_every=1",
            "train.eval_every=100000 steps", "checkpoint.every=100000 steps", "checkpoint.keep_every=100000 steps")
        with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as run:
            try:
                metrics = RunFolder(Path(out) / "run").metrics
                first, used = at_step(run, metrics, after, part.phase)
                last, used_then = at_step(run, metrics, after + part.length, part.phase)
            finally:
                kill_tree(run)
    return (used_then - used) / (last - first)


def at_step(run: subprocess.Popen[bytes], metrics: Path, step: int, phase: str) -> tuple[int, float]:
    """Wait until a run has taken ``step``; return the step that it has taken then, and its CPU-seconds so far."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and run.poll() is None:
        rows = read_lines(metrics) if metrics.exists() else []
        if rows and rows[-1]["step"] >= step:
            if rows[-1]["phase"] != phase:
                sys.exit(f"step {rows[-1]['step']} is in phase {rows[-1]['phase']} and not in {phase}: the run does "
                         "not repeat that of the study")
            return rows[-1]["step"], cpu_seconds(psutil.Process(run.pid))
        time.sleep(0.02)
    sys.exit(f"a run has not reached step {step} in {SECONDS} s, or has failed before")


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process and of those that it has started."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(each.cpu_times()[:2])
    return total


if __name__ == "__main__":
    main()
