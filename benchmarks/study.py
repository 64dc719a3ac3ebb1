"""Does PreLoRA keep the accuracy of full training, and what are its parts worth?

    make study                                     # all settings with 3 seeds; resumable
    python benchmarks/study.py --only exp1 full --seeds 1
    python benchmarks/study.py --summary           # only the aggregates of the runs that have finished
    python benchmarks/study.py --digits /tmp/study --seeds 1      # the same settings in runs of 20 s

Fashion-MNIST: 55,000 images train, 5,000 are held out for every choice, and the 10,000 test images are looked at once
per finished run. A window of 3 observations is 1 % of a run, as the paper's 3 of 300 epochs, and ranks have the paper's
share of the width: 1 to 8 of 96 for its 8 to 64 of 1,024.

Every run is a user's: launch/pretrain.py under DeepSpeed's launcher with one rank, two runs side by side. A setting
that begins like full training is a fork of the full run of the same seed, from its last checkpoint before they part. A
finished run is one file in benchmarks/results/study, and is not repeated; a run that was killed is resumed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from harness import ROOT, git_state, machine, versions
from study_results import (
    duration_of,
    phases_of,
    replayed_switch,
    result_file,
    result_of,
    run_folder,
    summarize,
)
from study_settings import FASHION, Study, digits

sys.path.insert(0, str(ROOT / "tests"))
from support.launch import launch_command

from prelora_ds.data.shards.writer import write_digits
from prelora_ds.files import replace_file
from prelora_ds.run.folder import RunFolder

SIDE_BY_SIDE = 2
# glibc would return every freed activation to the system and fault its pages in again, which takes 8 % of a step.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FASHION.settings, metavar="NAME", help=", ".join(FASHION.settings))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="do not begin a run after so many minutes")
    parser.add_argument("--digits", type=Path, metavar="FOLDER",
                        help="the same settings in short runs on scikit-learn's digits, with all files in FOLDER")
    parser.add_argument("--summary", action="store_true", help="only print and record the aggregates")
    args = parser.parse_args()
    study = digits(args.digits.resolve()) if args.digits else FASHION
    study.results.mkdir(parents=True, exist_ok=True)
    if not args.summary:
        if args.digits and not (args.digits / "digits").exists():
            with TemporaryDirectory(dir=args.digits) as partial:
                write_digits(Path(partial) / "digits")
                (Path(partial) / "digits").rename(args.digits / "digits")
        run_all(study, args.only or list(study.settings), args.seeds, args.minutes)
    summarize(study)


# ---- runs

def run_all(study: Study, names: Sequence[str], seeds: int, minutes: float) -> None:
    """Run what has not finished: the core first, and in it two seeds at a time from full training on."""
    needed = {"full", "exp1"} if set(names) - {"full"} else {"full"}
    core = [name for name, setting in study.settings.items() if setting.core]
    order = [(name, seed) for first in range(0, seeds, SIDE_BY_SIDE) for wave in (["full"], ["exp1"], core)
             for seed in range(first, min(first + SIDE_BY_SIDE, seeds)) for name in wave]
    order += [(name, seed) for seed in range(seeds) for name in study.settings]
    keys = [key for key in dict.fromkeys(order) if key[0] in names or key[0] in needed]
    missing = {key for key in keys if not result_file(study, *key).exists()}
    # Forks begin with the checkpoints of the full run, which another machine may have written.
    missing |= {("full", seed) for name, seed in missing
                if study.settings[name].forks and not RunFolder(run_folder(study, "full", seed)).model.exists()}
    queue = [key for key in keys if key in missing]
    begun = time.monotonic()
    running: dict[tuple[str, int], Future[float | None]] = {}
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for name, seed in queue:  # what a run waits for is earlier in the queue
            before = [run for key in needs_of(study, name, seed) if (run := running.get(key)) is not None]
            running[name, seed] = pool.submit(one_run, study, name, seed, before, begun + 60 * minutes)
        seconds: list[float] = []
        for run in as_completed(running.values()):
            if (taken := run.result()) is not None:
                seconds.append(taken)
                left = (len(queue) - len(seconds)) * mean(seconds) / SIDE_BY_SIDE
                print(f"{len(seconds)} of {len(queue)} runs; about {left / 60:.0f} min left", flush=True)


def needs_of(study: Study, name: str, seed: int) -> list[tuple[str, int]]:
    """Return the runs that have to finish before this one."""
    if name == "full":
        return []
    return [("full", seed), ("exp1", seed)] if study.settings[name].exp1 else [("full", seed)]


def one_run(study: Study, name: str, seed: int, before: Sequence[Future[float | None]], until: float) -> float | None:
    """Run a setting, and write its result; returns the seconds, or None if there was no time to begin.

    before: the runs to wait for. until: the time of time.monotonic() after which no run begins.
    """
    wait(before)
    needs = [result_file(study, *key) for key in needs_of(study, name, seed)]
    if time.monotonic() > until or not all(path.exists() for path in needs):
        return None
    out = run_folder(study, name, seed)
    started, load = time.monotonic(), os.getloadavg()[0]
    command, environ = command_of(study, name, seed, out, start_of(study, name, seed))
    study.out.mkdir(parents=True, exist_ok=True)
    print(f"{name}, seed {seed}: running", flush=True)
    with (study.out / f"{name}-{seed}.log").open("a") as log:
        run = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(run.pid, 0)
    if status:
        raise RuntimeError(f"{name}, seed {seed}: exit code {os.waitstatus_to_exitcode(status)}; see {log.name}")
    tested = subprocess.run(
        [sys.executable, "-m", "prelora_ds.cli", "evaluate", str(out / "model"), "--data",
         f"{study.data}/{study.test}", "--json"],
        cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - started
    result = result_of(study, name, seed, json.loads(tested.stdout)) | {
        "cpu_seconds_of_last_job": round(used.ru_utime + used.ru_stime),
        "seconds_of_last_job": round(seconds),
        "load_before": round(load, 1),
    }
    about = {"machine": machine(), "versions": versions(), "git": git_state()}
    replace_file(result_file(study, name, seed), json.dumps(about | result, indent=1) + "\n")
    return seconds


def command_of(
    study: Study, name: str, seed: int, out: Path, start: str, *overrides: str
) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of a run into ``out`` that begins with the checkpoint ``start``."""
    every = f"{study.checkpoint_every} steps"
    command, environ = launch_command(
        "--recipe", study.recipe, "--deepspeed_config", "ds_configs/zero2.json", "--resume", start,
        f"run.name={name}", f"run.seed={seed}", f"run.output_dir={out}",
        f"phases={json.dumps(phases_of(study, name, seed))}", f"train.duration={duration_of(study, name, seed)}",
        f"data.train={study.data}/train", f"data.val={study.data}/val",
        f"train.global_batch_size={study.batch}", f"train.micro_batch_size={study.batch}",
        f"observe.every={study.window // 3} steps", f"checkpoint.every={every}", f"checkpoint.keep_every={every}",
        *overrides, ranks=1)
    return command, environ | KEEP_FREED_MEMORY


def start_of(study: Study, name: str, seed: int) -> str:
    """The checkpoint to begin with, if the run has none of its own."""
    if not study.settings[name].forks or RunFolder(run_folder(study, name, seed)).config.exists():
        return "auto"
    last = max(0, parts_at(study, name, seed) - study.before_parting) // study.checkpoint_every * study.checkpoint_every
    return str(RunFolder(run_folder(study, "full", seed)).checkpoints / f"step-{last:08d}") if last else "auto"


def parts_at(study: Study, name: str, seed: int) -> int:
    """Return a step until which a setting does not leave full training."""
    until: str | Mapping[str, Any] = phases_of(study, name, seed)[0]["until"]
    if isinstance(until, str):
        return int(until.split()[0])
    if until["test"] == "fixed":
        return math.ceil(until["at"] * study.steps)
    return replayed_switch(study, name, seed) or study.steps


if __name__ == "__main__":
    main()
