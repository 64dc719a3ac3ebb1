"""How many CPU-seconds does a step of each phase of the study take?

    python benchmarks/study_cpu.py     # after `make study`, alone on the machine; about 15 minutes

The runs of the study shared the machine. So each phase of the first seed is measured once more, alone: a fork from the
last checkpoint before a step of the phase takes STEPS steps, and the CPU time of all its processes is read before and
after them. Where fewer and fewer adapters train, the phase is measured at PLACES steps. `study.py --summary` then has
the CPU-seconds of each phase.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import psutil
from harness import ROOT, print_table, record
from study import launch_command, settings_of
from study_results import phases_of, read, result_file, run_folder
from study_settings import FASHION, Study

from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import read_lines

SEED = 0
WARM = 4  # steps that are not measured, at the beginning of a job or of a phase
STEPS = 24
PLACES = 4
SECONDS = 300


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    study = FASHION
    phases = list(phases_to_measure(study))
    measured: dict[str, list[float]] = {}
    rows = []
    for name, phase, method, steps in phases:
        if method not in measured:
            measured[method] = [cpu_of_a_step(study, name, step) for step in steps]
        row = {"setting": name, "phase": phase, "CPU-seconds of a step": round(mean(measured[method]), 4),
               "each": [round(seconds, 4) for seconds in measured[method]], "at": steps}
        rows.append(row)
        print(f"{len(rows)} of {len(phases)}: {name}, {phase}: {row['CPU-seconds of a step']} s", flush=True)
    print_table(rows, "CPU-seconds of a step of the study")
    seconds = {(row["setting"], row["phase"]): row["CPU-seconds of a step"] for row in rows}
    full = seconds["full", "full"]
    record("study_cpu", {
        "full_cpu_s": full,
        "exp1_warmup_vs_full": round(seconds["exp1", "warmup"] / full, 3),
        "exp1_lora_vs_full": round(seconds["exp1", "lora"] / full, 3),
    }, rows, f"each: the mean of {STEPS} steps; at: the step before them. One rank with one thread, batches of "
             f"{study.batch}; the loader works in the process of the rank. What several settings have in common, such "
             "as the warm-up of exp1, was measured once.")


def phases_to_measure(study: Study) -> Iterator[tuple[str, str, str, list[int]]]:
    """Yield (setting, phase, the method until its end, steps after which to measure) of all that has finished.

    Full training is the same in all settings, and is measured in the first.
    """
    for name in study.settings:
        if not result_file(study, name, SEED).exists():
            continue
        method, begins = phases_of(study, name, SEED), 0
        for i, (phase, steps) in enumerate(read(result_file(study, name, SEED))["steps_by_phase"].items()):
            first, last = begins + WARM, begins + steps - STEPS
            begins += steps
            shrinks = method[i].get("active", {}).get("choose") == "unconverged"
            if phase != "full" or name == "full":
                yield name, phase, json.dumps(method[: i + 1]), [
                    first + (last - first) * part // PLACES for part in range(PLACES if shrinks else 1)]


def cpu_of_a_step(study: Study, name: str, at: int) -> float:
    """Return the CPU-seconds of a step, as a mean of STEPS steps after step ``at`` of a setting."""
    folder = RunFolder(run_folder(study, name, SEED))
    before = [path for path in folder.checkpoints.glob("step-*") if int(path.name[5:]) <= at - WARM]
    start = str(max(before)) if before else "auto"
    with tempfile.TemporaryDirectory() as out:
        command, environ = launch_command(
            "--recipe", study.recipe, "--deepspeed_config", "ds_configs/zero2.json", "--resume", start,
            f"run.name={name}", f"run.seed={SEED}", f"run.output_dir={out}/run", *settings_of(study, name, SEED),
            "train.log_every=1", "train.eval_every=100000 steps", ranks=1)
        with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as run:
            try:
                process = psutil.Process(run.pid)
                metrics = RunFolder(Path(out) / "run").metrics
                first, used = at_step(process, metrics, at)
                last, used_then = at_step(process, metrics, at + STEPS)
            finally:
                end(run)
    return (used_then - used) / (last - first)


def at_step(process: psutil.Process, metrics: Path, step: int) -> tuple[int, float]:
    """Wait until a run has taken ``step``; return the step that it has taken then, and its CPU-seconds so far."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        rows = read_lines(metrics) if metrics.exists() else []
        if rows and rows[-1]["step"] >= step:
            return rows[-1]["step"], cpu_seconds(process)
        time.sleep(0.02)
    sys.exit(f"a run has not reached step {step} in {SECONDS} s, or has failed before")


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process and of those that it has started."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(each.cpu_times()[:2])
    return total


def end(run: subprocess.Popen[bytes]) -> None:
    """End a run and all processes that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    main()
