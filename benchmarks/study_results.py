"""The result of each run of the study, and what the runs of a setting have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from harness import RESULTS, print_table, record
from study_settings import TRAINED, Study

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


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def result_file(study: Study, name: str, seed: int) -> Path:
    return study.results / f"{name}-{seed}.json"


def run_folder(study: Study, name: str, seed: int) -> Path:
    return study.out / f"{name}-{seed}"


def phases_of(study: Study, name: str, seed: int) -> list[dict[str, Any]]:
    """The phases of a setting; those of two controls have the mean rank that Algorithm 2 chose in Exp1."""
    phases = study.settings[name].phases
    if phases is not None:
        return phases
    adapters = {"rank": max(1, round(mean(read(result_file(study, "exp1", seed))["ranks"])))}
    if name == "static_lora":
        return [{"name": "lora", "adapters": adapters, "train": TRAINED}]
    return study.prelora("exp1", adapters=adapters)


def replayed_switch(study: Study, name: str, seed: int) -> int | None:
    """Return the step after which Algorithm 1 ends full training by a replay of the full run; None if it does not."""
    until = phases_of(study, name, seed)[0]["until"]
    if isinstance(until, str) or until["test"] != "prelora":
        return None
    parameters = {key: (value,) for key, value in until.items() if key != "test"}
    found = replayed(read_logged(RunFolder(run_folder(study, "full", seed))), Settings("prelora", parameters))
    step: int | None = found["grid"][0]["step"]
    return step


def duration_of(study: Study, name: str, seed: int) -> str:
    if name == "equal_compute":
        return f"{round(read(result_file(study, 'exp1', seed))['flops_over_full'] * study.steps)} steps"
    if name == "equal_time":
        return f"{round(weighted_steps(read(result_file(study, 'exp1', seed)), zero_stages_rates()))} steps"
    return f"{study.steps} steps"


def result_of(study: Study, name: str, seed: int, tested: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a finished run has reached. tested: its accuracy and loss on the test images."""
    folder = RunFolder(run_folder(study, name, seed))
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
        "replayed_switch": replayed_switch(study, name, seed) if study.settings[name].forks else None,
        "ranks": sorted(spec.rank or 0 for spec in plans[-1][1].adapters.values()),
        "trainable_share": last["trainable_parameters"] / last["all_parameters"],
        "flops_over_full":
            flops(config, setup.layout, plans, steps) / flops(config, setup.layout, plans[:1], study.steps),
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
    """Return the median seconds of a step of each phase, beside what else ran and without the time of the loader."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get("step_s") is not None:
            found.setdefault(row["phase"], []).append(row["step_s"])
    return {phase: round(median(seconds), 4) for phase, seconds in found.items()}


def summarize(study: Study) -> None:
    """Print and record the aggregates of what has finished."""
    results = [read(path) for path in sorted(study.results.glob("*.json"))]
    rows = [aggregate(study, name, results) for name in study.settings if any(r["setting"] == name for r in results)]
    shown = [{key: value for key, value in row.items() if key != "about"} for row in rows]
    print_table(shown, f"{study.recipe}: test top-1 in per cent; differences to full training of the same seed")
    by_name = {row["setting"]: row for row in rows}
    core = [name for name, setting in study.settings.items() if setting.core]
    seeds = min(by_name[name]["seeds"] if name in by_name else 0 for name in core)
    record("study", figures_of(by_name, results) | {"runs": len(results), "seeds": seeds}, rows, NOTES,
           study.results.parent)


NOTES = (
    "minus full, minus exp1: mean over seeds of the difference to that run of the same seed; +-: half the width of "
    "its 95 % interval by Student's t. FLOPs / full: of this model, by cost/. steps at ViT-L's rates: the steps of "
    "each phase times the ratio of its step to a full step on blocks of ViT-L (lora_step.json); time at ViT-L's rates: "
    "the same with the seconds per step of ViT-L at ZeRO 2 and 4 images per rank (zero_stages.json). Both are empty "
    "where only some adapters train at a time, and for ReLoRA, whose rank has not been measured there. CPU-seconds by "
    "phase: the steps of each phase times the CPU-seconds of such a step of the first seed, measured alone on "
    "the machine (study_cpu.json); evaluations and checkpoints are not in them, and one merge per cycle is."
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


def aggregate(study: Study, name: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    runs = [r for r in results if r["setting"] == name]
    reached = accuracies(name, results)
    minus_full, interval = difference(reached, accuracies("full", results))
    minus_exp1, interval_exp1 = difference(reached, accuracies("exp1", results))
    switches = [r["first_switch"] for r in runs]
    ranks = [mean(r["ranks"]) for r in runs if r["ranks"]]
    return {
        "setting": name,
        "about": study.settings[name].about,
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
        "steps at ViT-L's rates": at_rates(study, name, runs, lora_step_rates()),
        "time at ViT-L's rates": at_rates(study, name, runs, zero_stages_rates()),
        "CPU-seconds by phase": cpu_by_phase(study, name, runs),
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
    figures = read(RESULTS / "lora_step.json")["figures"]
    return {"full": 1.0, "warmup": figures["warmup_vs_full"], "lora": figures["lora_r30_vs_full"]}


def zero_stages_rates() -> dict[str, float]:
    """Return the seconds of a step of ViT-L at ZeRO 2 and 4 images per rank over those of a full step."""
    rows = read(RESULTS / "zero_stages.json")["rows"]
    seconds = {row["phase"]: row["seconds"]["4"]["step"] for row in rows if row["ZeRO"] == "2"}
    return {phase: seconds[phase] / seconds["full"] for phase in ("full", "warmup", "lora")}


def at_rates(study: Study, name: str, runs: Sequence[Mapping[str, Any]], rates: Mapping[str, float]) -> float | None:
    """Return the time of ``runs`` over that of full training, if each step of a phase takes its rate."""
    phases = study.settings[name].phases or ()
    others = any("active" in phase or "kind" in phase.get("adapters", {}) for phase in phases)
    if others or any(phase["name"] not in rates for phase in phases):
        return None
    return round(mean(weighted_steps(run, rates) / study.steps for run in runs), 3)


def cpu_by_phase(study: Study, name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """Return the CPU-seconds of the steps of each phase, as a mean over ``runs``; None if they were not measured."""
    path = study.results.parent / "study_cpu.json"
    rows = read(path)["rows"] if path.exists() else []
    of_a_step = {row["phase"]: row["CPU-seconds of a step"] for row in rows
                 if row["setting"] == ("full" if row["phase"] == "full" else name)}
    phases = runs[0]["steps_by_phase"]
    if not all(phase in of_a_step for phase in phases):
        return None
    return {phase: round(of_a_step[phase] * mean(run["steps_by_phase"].get(phase, 0) for run in runs))
            for phase in phases}


def weighted_steps(run: Mapping[str, Any], rates: Mapping[str, float]) -> float:
    return sum(steps * rates[phase] for phase, steps in run["steps_by_phase"].items())
