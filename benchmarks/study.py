"""Does PreLoRA keep the accuracy of full training, and what are its parts worth?

    make study                                     # all settings with 3 seeds; resumable
    python benchmarks/study.py --only exp1 full --seeds 1
    python benchmarks/study.py --summary           # only the aggregates of the runs that have finished

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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from harness import ROOT, git_state, machine, print_table, record, versions

sys.path.insert(0, str(ROOT / "tests"))
from support.launch import launch_command

from prelora_ds.config.load import load_config
from prelora_ds.config.tree import Config
from prelora_ds.core.codec import from_json
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.core.selection import with_active
from prelora_ds.cost.flops import micro_batch
from prelora_ds.reporting.replay import Settings, read_logged, replayed
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import read_lines
from prelora_ds.run.setup_record import read_setup

RECIPE = "launch/recipes/fashion_full.yaml"
DATA = ROOT / "data/fashion"
OUT = ROOT / "out/study"
RESULTS = ROOT / "benchmarks/results/study"
STEPS = 2149  # 20 epochs of 55,000 images in batches of 512
SIDE_BY_SIDE = 2
# glibc would return every freed activation to the system and fault its pages in again, which takes 8 % of a step.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
CHECKPOINT_EVERY = 105  # steps, a whole number of windows
# Full training closes no windows, so a fork begins this many steps before it can leave full training: Algorithm 1 needs
# three windows of 21 steps, and Algorithm 2 two.
BEFORE_PARTING = 63
# The thresholds of the paper's experiments, in per cent.
EXPERIMENTS = {"exp1": (1.0, 5.0), "exp2": (0.5, 2.5), "exp3": (0.25, 1.0)}


def share(of_300_epochs: float) -> str:
    """Return the duration that is the same share of this run as ``of_300_epochs`` is of the paper's 300 epochs."""
    return f"{max(1, round(of_300_epochs / 300 * STEPS))} steps"


ALGORITHM_2 = {"ranks": {"rule": "prelora", "r_min": 1, "r_max": 8}}
TRAINED = ["adapters", "rest"]


def until(experiment: str) -> dict[str, Any]:
    tau, zeta = EXPERIMENTS[experiment]
    return {"test": "prelora", "tau": tau, "zeta": zeta, "k": 3, "m": 3}


def prelora(experiment: str, *, warmup: float = 10, adapters: Mapping[str, Any] = ALGORITHM_2,
            lora: Mapping[str, Any] | None = None, rate: float = 1) -> list[dict[str, Any]]:
    """Full training, the warm-up, and the LoRA phase with ``lora`` added; adapters have ``rate`` times the rate."""
    scale = {} if rate == 1 else {"lr_scale": {"adapters": rate}}
    last = {"name": "lora", "train": TRAINED, **scale, **(lora or {})}
    if warmup == 0:
        return [{"name": "full", "until": until(experiment)}, {**last, "adapters": dict(adapters)}]
    return [{"name": "full", "until": until(experiment)},
            {"name": "warmup", "adapters": dict(adapters), "until": share(warmup), **scale}, last]


def dropped(phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same phases, each of which begins with new Adam moments, as a new job would."""
    return [phases[0], *({**phase, "moments": "reset"} for phase in phases[1:])]


MERGE = {"every": share(4.8), "reset": {"rule": "magnitude", "share": 0.25}, "rewarm": share(0.64)}
RELORA = {"name": "relora", "adapters": {"rank": 24}, "train": TRAINED, "rewarm": share(1), "merge": MERGE}
ACTIVE = {"k": 24, "every": "4 steps"}  # of 36 adapters; with backward importance all train in one of these steps
FREEZING = {"choose": "unconverged", "tau": 0.1, "every": share(3), "cut_backward": True}


@dataclass(frozen=True)
class Setting:
    """A variant.

    about: how it differs from the others, for the table.
    phases: its method; None for one that needs the results of Exp1 (`phases_of`).
    exp1: whether it takes something from the results of Exp1, its rank or its duration.
    forks: whether it begins like full training.
    core: whether it is part of the core, which comes first.
    """

    about: str
    phases: list[dict[str, Any]] | None
    exp1: bool = False
    forks: bool = True
    core: bool = True


SETTINGS: dict[str, Setting] = {
    "full": Setting("all parameters train to the end", [{"name": "full"}], forks=False),
    **{name: Setting(f"PreLoRA: tau {tau:g} %, zeta {zeta:g} %, w = 10 epochs, ranks by Algorithm 2", prelora(name))
       for name, (tau, zeta) in EXPERIMENTS.items()},
    "equal_compute": Setting("full training of as many steps as cost the FLOPs of exp1", [{"name": "full"}],
                             exp1=True, forks=False),
    "static_lora": Setting("LoRA from the first step on, with the mean rank of exp1", None, exp1=True, forks=False),
    "uniform": Setting("exp1 with its mean rank in each linear", None, exp1=True),
    "no_warmup": Setting("exp1 with w = 0", prelora("exp1", warmup=0)),
    "moments_dropped": Setting("exp1 with new Adam moments after each switch", dropped(prelora("exp1"))),
    "relora": Setting("full training for 48 epochs, then ReLoRA of rank 24 with a merge every 4.8 epochs",
                      [{"name": "full", "until": share(48)}, RELORA]),
    "hybrid": Setting("relora until the test of exp1 passes, then its warm-up and LoRA phase", [
        {"name": "full", "until": share(48)}, {**RELORA, "until": until("exp1")},
        {"name": "warmup", "adapters": {"from": "merge", **ALGORITHM_2}, "until": share(10)},
        {"name": "lora", "train": TRAINED}]),
    "dynalora_random": Setting("exp1 with 24 of 36 adapters active, drawn anew every 4 steps",
                               prelora("exp1", lora={"active": {"choose": "random", **ACTIVE}})),
    "dynalora_forward": Setting("exp1 with 24 of 36 adapters active, chosen by forward importance",
                                prelora("exp1", lora={"active": {
                                    "choose": "discounted", "importance": "forward", **ACTIVE}})),
    "freezing": Setting("exp1 with adapters frozen once they have settled, and no backward pass below the others",
                        prelora("exp1", lora={"active": FREEZING})),
    "equal_time": Setting("full training of as many steps as take the time of exp1 at ViT-L's rates",
                          [{"name": "full"}], exp1=True, forks=False, core=False),
    "w5": Setting("exp1 with w = 5", prelora("exp1", warmup=5), core=False),
    "w15": Setting("exp1 with w = 15", prelora("exp1", warmup=15), core=False),
    "random_ranks": Setting("exp1 with the ranks of Algorithm 2 in a random order",
                            prelora("exp1", adapters={"ranks": {
                                "rule": "random", "draw": "permuted", "r_min": 1, "r_max": 8}}), core=False),
    "fixed_25": Setting("exp1 with a switch at 25 % of the run", [
        {"name": "full", "until": {"test": "fixed", "at": 0.25, "m": 3}}, *prelora("exp1")[1:]], core=False),
    "fixed_50": Setting("exp1 with a switch at 50 % of the run", [
        {"name": "full", "until": {"test": "fixed", "at": 0.5, "m": 3}}, *prelora("exp1")[1:]], core=False),
    "update_no_warmup": Setting("exp1 with w = 0, and A from the singular directions of the recent update",
                                prelora("exp1", warmup=0, adapters={**ALGORITHM_2, "options": {"init": "update"}}),
                                core=False),
    **{f"rate_{rate}": Setting(f"exp1 with {rate} times the learning rate for adapters", prelora("exp1", rate=rate),
                               core=False) for rate in (4, 10, 30)},
    "rate_10_exp3": Setting("exp3 with 10 times the learning rate for adapters", prelora("exp3", rate=10),
                            core=False),
    "rate_10_merging": Setting("rate_10 that merges its adapters every 4.8 epochs, as relora does",
                               prelora("exp1", lora={"merge": MERGE}, rate=10), core=False),
    "rate_10_freezing": Setting("freezing with 10 times the learning rate for adapters",
                                prelora("exp1", rate=10, lora={"active": FREEZING}), core=False),
    "dora": Setting("exp1 with DoRA", prelora("exp1", adapters={"kind": "dora", **ALGORITHM_2}), core=False),
    "dynavera": Setting("exp1 with w = 0 and VeRA of rank 24, 24 of 36 adapters active by forward importance",
                        prelora("exp1", warmup=0, adapters={"kind": "vera", "rank": 24}, lora={
                            "lr_scale": {"adapters": 10},
                            "active": {"choose": "discounted", "importance": "forward", **ACTIVE}}), core=False),
    "dynalora_backward": Setting("dynalora_forward by backward importance", prelora("exp1", lora={"active": {
        "choose": "discounted", "importance": "backward", **ACTIVE}}), core=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, metavar="NAME", help=", ".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many minutes")
    parser.add_argument("--summary", action="store_true", help="run nothing")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if not args.summary:
        run_all(args.only or list(SETTINGS), args.seeds, args.minutes)
    summarize()


# ---- runs

def run_all(names: Sequence[str], seeds: int, minutes: float) -> None:
    """Run what has not finished: the core first, and in it two seeds at a time from full training on."""
    needed = {"full", "exp1"} if set(names) - {"full"} else {"full"}
    core = [name for name in SETTINGS if SETTINGS[name].core]
    order = [(name, seed) for first in range(0, seeds, SIDE_BY_SIDE) for wave in (["full"], ["exp1"], core)
             for seed in range(first, min(first + SIDE_BY_SIDE, seeds)) for name in wave]
    order += [(name, seed) for seed in range(seeds) for name in SETTINGS]
    keys = [key for key in dict.fromkeys(order) if key[0] in names or key[0] in needed]
    missing = {key for key in keys if not result_file(*key).exists()}
    # Forks begin with the checkpoints of the full run, which another machine may have written.
    missing |= {("full", seed) for name, seed in missing
                if SETTINGS[name].forks and not RunFolder(OUT / f"full-{seed}").model.exists()}
    queue = [key for key in keys if key in missing]
    begun = time.monotonic()
    running: dict[tuple[str, int], Future[float | None]] = {}
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for name, seed in queue:  # what a run waits for is earlier in the queue
            before = [run for key in needs_of(name, seed) if (run := running.get(key)) is not None]
            running[name, seed] = pool.submit(one_run, name, seed, before, begun + 60 * minutes)
        seconds: list[float] = []
        for run in as_completed(running.values()):
            if (taken := run.result()) is not None:
                seconds.append(taken)
                left = (len(queue) - len(seconds)) * mean(seconds) / SIDE_BY_SIDE
                print(f"{len(seconds)} of {len(queue)} runs; about {left / 60:.0f} min left", flush=True)


def needs_of(name: str, seed: int) -> list[tuple[str, int]]:
    """Return the runs that have to finish before this one."""
    if name == "full":
        return []
    return [("full", seed), ("exp1", seed)] if SETTINGS[name].exp1 else [("full", seed)]


def result_file(name: str, seed: int) -> Path:
    return RESULTS / f"{name}-{seed}.json"


def one_run(name: str, seed: int, before: Sequence[Future[float | None]], until: float) -> float | None:
    """Run a setting, and write its result; returns the seconds, or None if there was no time to begin.

    before: the runs to wait for. until: the time of time.monotonic() after which no run begins.
    """
    wait(before)
    if time.monotonic() > until or not all(result_file(*key).exists() for key in needs_of(name, seed)):
        return None
    out = OUT / f"{name}-{seed}"
    started, load = time.monotonic(), os.getloadavg()[0]
    command, environ = launch_command(
        "--recipe", RECIPE, "--deepspeed_config", "ds_configs/zero2.json", "--resume", start_of(name, seed, out),
        f"run.name={name}", f"run.seed={seed}", f"run.output_dir={out}", f"phases={json.dumps(phases_of(name, seed))}",
        f"train.duration={duration_of(name, seed)}", "train.micro_batch_size=512",
        f"checkpoint.every={CHECKPOINT_EVERY} steps", f"checkpoint.keep_every={CHECKPOINT_EVERY} steps", ranks=1)
    OUT.mkdir(parents=True, exist_ok=True)
    print(f"{name}, seed {seed}: running", flush=True)
    with (OUT / f"{name}-{seed}.log").open("a") as log:
        run = subprocess.Popen(command, cwd=ROOT, env=environ | KEEP_FREED_MEMORY, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(run.pid, 0)
    if status:
        raise RuntimeError(f"{name}, seed {seed}: exit code {os.waitstatus_to_exitcode(status)}; see {log.name}")
    tested = subprocess.run([sys.executable, "-m", "prelora_ds.cli", "evaluate", str(out / "model"), "--data",
                             str(DATA / "test"), "--json"], cwd=ROOT, env=environ, capture_output=True, text=True,
                            check=True)
    seconds = time.monotonic() - started
    result = result_of(name, seed, out, json.loads(tested.stdout)) | {
        "cpu_seconds_of_last_job": round(used.ru_utime + used.ru_stime),
        "seconds_of_last_job": round(seconds),
        "load_before": round(load, 1),
    }
    about = {"machine": machine(), "versions": versions(), "git": git_state()}
    result_file(name, seed).write_text(json.dumps(about | result, indent=1) + "\n")
    return seconds


def phases_of(name: str, seed: int) -> list[dict[str, Any]]:
    """The phases of a setting; those of two controls have the mean rank that Algorithm 2 chose in Exp1."""
    phases = SETTINGS[name].phases
    if phases is not None:
        return phases
    adapters = {"rank": max(1, round(mean(read(result_file("exp1", seed))["ranks"])))}
    if name == "static_lora":
        return [{"name": "lora", "adapters": adapters, "train": TRAINED}]
    return prelora("exp1", adapters=adapters)


def duration_of(name: str, seed: int) -> str:
    if name == "equal_compute":
        return f"{round(read(result_file('exp1', seed))['flops_over_full'] * STEPS)} steps"
    if name == "equal_time":
        return f"{round(weighted_steps(read(result_file('exp1', seed)), zero_stages_rates()))} steps"
    return f"{STEPS} steps"


def start_of(name: str, seed: int, out: Path) -> str:
    """The checkpoint to begin with, if the run has none of its own."""
    if not SETTINGS[name].forks or RunFolder(out).config.exists():
        return "auto"
    last = max(0, parts_at(name, seed) - BEFORE_PARTING) // CHECKPOINT_EVERY * CHECKPOINT_EVERY
    return str(RunFolder(OUT / f"full-{seed}").checkpoints / f"step-{last:08d}") if last else "auto"


def parts_at(name: str, seed: int) -> int:
    """Return a step until which a setting does not leave full training."""
    until: str | Mapping[str, Any] = phases_of(name, seed)[0]["until"]
    if isinstance(until, str):
        return int(until.split()[0])
    if until["test"] == "fixed":
        return math.ceil(until["at"] * STEPS)
    return replayed_switch(name, seed) or STEPS


def replayed_switch(name: str, seed: int) -> int | None:
    """Return the step after which Algorithm 1 ends full training by a replay of the full run; None if it does not."""
    until = phases_of(name, seed)[0]["until"]
    if isinstance(until, str) or until["test"] != "prelora":
        return None
    parameters = {key: (value,) for key, value in until.items() if key != "test"}
    found = replayed(read_logged(RunFolder(OUT / f"full-{seed}")), Settings("prelora", parameters))
    step: int | None = found["grid"][0]["step"]
    return step


# ---- results

def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def result_of(name: str, seed: int, out: Path, tested: Mapping[str, Any]) -> dict[str, Any]:
    folder = RunFolder(out)
    config = load_config(folder.config)
    setup = read_setup(folder)
    assert setup is not None
    rows, events = read_lines(folder.metrics), read_lines(folder.events)
    plans = list(plans_of(config, setup.layout, events))
    evaluated = [row for row in rows if row.get("val/acc1") is not None]
    best = max(evaluated, key=lambda row: row["val/acc1"])
    steps = rows[-1]["step"]
    switches = [event["step"] for event in events if event["event"] == "plan" and event["step"] > 0]
    last = next(event for event in reversed(events) if event["event"] == "plan")
    return {
        "setting": name,
        "seed": seed,
        "steps": steps,
        "test_acc1": tested["acc1"],
        "test_loss": tested["loss"],
        "val_acc1": evaluated[-1]["val/acc1"],
        "val_loss": evaluated[-1]["val/loss"],
        "best_val_acc1": best["val/acc1"],
        "best_epoch": round(best["epoch"], 2),
        "train_loss": mean(row["train/loss"] for row in rows[-10:]),
        "steps_by_phase": steps_by_phase(plans, steps),
        "first_switch": switches[0] if switches else None,
        "replayed_switch": replayed_switch(name, seed) if SETTINGS[name].forks else None,
        "ranks": sorted(spec.rank or 0 for spec in plans[-1][1].adapters.values()),
        "trainable_share": last["trainable_parameters"] / last["all_parameters"],
        "flops_over_full": flops(config, setup.layout, plans, steps) / flops(config, setup.layout, plans[:1], STEPS),
        "bytes": {event["phase"]: event["measured"] for event in events if event["event"] == "bytes"},
        "step_seconds": step_seconds(rows),
        "forked_at": next((event["step"] for event in events[:1] if event["event"] == "resume"), 0),
    }


def plans_of(config: Config, layout: Layout, events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Plan]]:
    """Yield (step, plan) wherever the plan changes, with that of full training at step 0 for a fork."""
    plan = Plan(phase="full", trainable=frozenset(layout.parameters), adapters={})
    yield 0, plan
    for event in events:
        if event["event"] == "plan":
            plan = from_json(Plan, event["plan"])
            yield event["step"], plan
        elif event["event"] == "active":
            active = config.phase(plan.phase).active
            assert active is not None, "only such a phase chooses adapters"
            cut = active.selection().cut_backward
            yield event["step"], with_active(plan, layout, frozenset(event["adapters"]), cut_backward=cut)


def steps_by_phase(plans: Sequence[tuple[int, Plan]], steps: int) -> dict[str, int]:
    """Return the steps of each phase of a run of ``steps``."""
    found: dict[str, int] = {}
    for (begins, plan), (ends, _) in pairwise([*plans, (steps, plans[-1][1])]):
        if ends > begins:
            found[plan.phase] = found.get(plan.phase, 0) + ends - begins
    return found


def flops(config: Config, layout: Layout, plans: Sequence[tuple[int, Plan]], steps: int) -> int:
    """The FLOPs of a run of ``steps`` under ``plans``, by cost/."""
    total = 0
    for (begins, plan), (ends, _) in pairwise([*plans, (steps, plans[-1][1])]):
        total += (ends - begins) * micro_batch(config.model, plan, layout, 1, kernel="branch").flops
    return total


def step_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median seconds of a step of each phase; a rank has one thread, so they are CPU-seconds if alone."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get("step_s") is not None:
            found.setdefault(row["phase"], []).append(row["step_s"])
    return {phase: round(median(seconds), 4) for phase, seconds in found.items()}


def summarize() -> None:
    """Print and record the aggregates of what has finished."""
    results = [read(path) for path in sorted(RESULTS.glob("*.json"))]
    rows = [aggregate(name, results) for name in SETTINGS if any(r["setting"] == name for r in results)]
    shown = [{key: value for key, value in row.items() if key != "about"} for row in rows]
    print_table(shown, "Fashion-MNIST, test top-1 in per cent; differences to full training of the same seed")
    by_name = {row["setting"]: row for row in rows}
    seeds = min(by_name[name]["seeds"] if name in by_name else 0 for name in SETTINGS if SETTINGS[name].core)
    record("study", figures_of(by_name, results) | {"runs": len(results), "seeds": seeds}, rows, NOTES)


NOTES = (
    "minus full, minus exp1: mean over seeds of the difference to that run of the same seed; +-: half the width of "
    "its 95 % interval by Student's t. FLOPs / full: of this model, by cost/. steps at ViT-L's rates: the steps of "
    "each phase times the ratio of its step to a full step on blocks of ViT-L (lora_step.json); time at ViT-L's rates: "
    "the same with the seconds per step of ViT-L at ZeRO 2 and 4 images per rank (zero_stages.json). Both are empty "
    "where only some adapters train at a time, and for ReLoRA, whose rank has not been measured there."
)


def figures_of(by_name: Mapping[str, Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, row in by_name.items():
        if name != "full":
            figures[f"{name}_acc_minus_full_pt"] = row["minus full"]
            figures[f"{name}_cost_vs_full"] = row["FLOPs / full"]
            figures[f"{name}_time_vs_full"] = row["time at ViT-L's rates"]
    for figure, other, sign in (("uniform_minus_algorithm2_pt", "uniform", 1),
                                ("no_warmup_minus_w10_pt", "no_warmup", 1),
                                ("carried_minus_dropped_pt", "moments_dropped", -1)):
        if other in by_name:
            figures[figure] = sign * by_name[other]["minus exp1"]
    apart = [abs(r["replayed_switch"] - r["first_switch"]) for r in results if r["replayed_switch"] is not None]
    if apart:
        figures["most_steps_between_replay_and_run"] = max(apart)
    return {name: value for name, value in figures.items() if value is not None}


T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t by degrees of freedom


def aggregate(name: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    runs = [r for r in results if r["setting"] == name]
    reached = accuracies(name, results)
    minus_full, interval = difference(reached, accuracies("full", results))
    minus_exp1, interval_exp1 = difference(reached, accuracies("exp1", results))
    switches = [r["first_switch"] for r in runs]
    ranks = [mean(r["ranks"]) for r in runs if r["ranks"]]
    return {
        "setting": name,
        "about": SETTINGS[name].about,
        "seeds": len(runs),
        "test top-1": round(mean(reached.values()), 2),
        "sd": round(stdev(reached.values()), 2) if len(reached) > 1 else None,
        "minus full": minus_full,
        "+-": interval,
        "minus exp1": minus_exp1,
        "+- (exp1)": interval_exp1,
        "val top-1": round(100 * mean(r["val_acc1"] for r in runs), 2),
        "first switch": None if None in switches else round(mean(switches)),
        "mean rank": round(mean(ranks), 2) if ranks else None,
        "trainable": round(mean(r["trainable_share"] for r in runs), 4),
        "FLOPs / full": round(mean(r["flops_over_full"] for r in runs), 3),
        "steps at ViT-L's rates": at_rates(name, runs, lora_step_rates()),
        "time at ViT-L's rates": at_rates(name, runs, zero_stages_rates()),
    }


def accuracies(name: str, results: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return seed -> test top-1 in per cent."""
    return {r["seed"]: 100 * r["test_acc1"] for r in results if r["setting"] == name}


def difference(some: Mapping[int, float], others: Mapping[int, float]) -> tuple[float | None, float | None]:
    """Return the mean difference over the seeds that both have, and half the width of its 95 % interval."""
    pairs = [value - others[seed] for seed, value in some.items() if seed in others]
    if not pairs:
        return None, None
    freedom = len(pairs) - 1
    half = T_95[freedom] * stdev(pairs) / math.sqrt(len(pairs)) if freedom else None
    return round(mean(pairs), 2), None if half is None else round(half, 2)


def lora_step_rates() -> dict[str, float]:
    """Return the seconds of a step on blocks of ViT-L over those of a full step."""
    figures = read(RESULTS.parent / "lora_step.json")["figures"]
    return {"full": 1.0, "warmup": figures["warmup_vs_full"], "lora": figures["lora_r30_vs_full"]}


def zero_stages_rates() -> dict[str, float]:
    """Return the seconds of a step of ViT-L at ZeRO 2 and 4 images per rank over those of a full step."""
    rows = read(RESULTS.parent / "zero_stages.json")["rows"]
    seconds = {row["phase"]: row["seconds"]["4"]["step"] for row in rows if row["ZeRO"] == "2"}
    return {phase: seconds[phase] / seconds["full"] for phase in ("full", "warmup", "lora")}


def at_rates(name: str, runs: Sequence[Mapping[str, Any]], rates: Mapping[str, float]) -> float | None:
    """Return the time of ``runs`` over that of full training, if each step of a phase takes its rate."""
    phases = SETTINGS[name].phases or ()
    others = any("active" in phase or "kind" in phase.get("adapters", {}) for phase in phases)
    if others or any(phase["name"] not in rates for phase in phases):
        return None
    return round(mean(weighted_steps(run, rates) / STEPS for run in runs), 3)


def weighted_steps(run: Mapping[str, Any], rates: Mapping[str, float]) -> float:
    return sum(steps * rates[phase] for phase, steps in run["steps_by_phase"].items())


if __name__ == "__main__":
    main()
