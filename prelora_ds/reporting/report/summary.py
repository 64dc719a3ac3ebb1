"""What a report says in words and numbers about its runs, ready for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean, stdev
from typing import Any

from prelora_ds.config.changes import binding_differences
from prelora_ds.core.stragglers import Change
from prelora_ds.reporting.report.figure import Cell
from prelora_ds.reporting.report.figures import epoch_minutes
from prelora_ds.reporting.report.run import Phase, Run
from prelora_ds.version import __version__

SCHEMA_VERSION = 1
NOT_LOGGED = "not logged"
# Runs whose configs differ only in these are repetitions of one experiment.
SEED = "run.seed"
MOST_STRAGGLERS = 10
# What the table of finals compares: key -> (title, factor, digits after the point, unit).
FINALS: dict[str, tuple[str, float, int, str]] = {
    "final_acc1": ("final top-1", 100, 2, "%"),
    "best_acc1": ("best top-1", 100, 2, "%"),
    "exported_acc1": ("exported top-1", 100, 2, "%"),
    "final_val_loss": ("final validation loss", 1, 4, ""),
    "final_loss": ("final training loss", 1, 4, ""),
    "steps": ("steps", 1, 0, ""),
    "hours": ("hours of training", 1, 4, "h"),
}


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Summarize ``runs``. Every number is exactly the one in the logs; means are of such numbers."""
    return {
        "schema_version": SCHEMA_VERSION,
        "prelora_ds": __version__,
        "runs": [_run(run, runs[0]) for run in runs],
        "seeds": list(_seeds(runs)),
        "notes": [f"{run.label}: {note}" for run in runs for note in run.notes] + list(_mixed(runs)),
    }


def _run(run: Run, first: Run) -> dict[str, Any]:
    finals = _finals(run)
    return {
        "run": run.label,
        "name": None if run.config is None else run.config.run.name,
        "folder": str(run.folder.path),
        "verdict": verdict(run),
        "ended": run.end is not None,
        "finals": finals,
        "difference_to_first": None if run is first else _difference(finals, _finals(first)),
        "settings_that_differ": None if run is first else _settings(first, run),
        "best_acc1_at_step": None if run.best is None else run.best[1],
        "epochs": run.epochs,
        "samples": run.samples,
        "ranks": run.ranks,
        "hosts": run.facts.get("hosts", run.attempt_hosts),
        "peak_rss_bytes": None if run.end is None else max(run.end.peak_rss_bytes),
        "command": run.facts.get("command"),
        "commit": run.facts.get("commit"),
        "versions": run.facts.get("versions"),
        "config_hash": run.config_hash,
        "not_run": list(not_run(run)),
        "phases": [_phase(run, phase) for phase in run.phases],
        "incidents": list(_incidents(run)),
    }


def _finals(run: Run) -> dict[str, float | int | None]:
    exported = run.accuracy
    return {
        "final_acc1": run.last.get("val/acc1"),
        "best_acc1": None if run.best is None else run.best[0],
        "exported_acc1": None if exported is None else exported.correct / exported.samples,
        "final_val_loss": run.last.get("val/loss"),
        "final_loss": run.last.get("train/loss"),
        "steps": run.steps,
        "hours": run.hours,
    }


def _difference(finals: dict[str, Any], first: dict[str, Any]) -> dict[str, float | None]:
    return {key: None if None in (value, first[key]) else value - first[key] for key, value in finals.items()}


def _phase(run: Run, phase: Phase) -> dict[str, Any]:
    return {
        "phase": phase.name,
        "first_step": max(phase.begins, run.first_step) + 1,
        "last_step": phase.ends or None,
        "reason": phase.reason,
        "trainable_parameters": phase.trainable_parameters,
        "all_parameters": phase.all_parameters,
        "switch_s": phase.switch_s,
        "step_s_median": phase.median("step_s"),
        "data_s_median": phase.median("data_s"),
        "img_s_median": phase.median("img_s"),
        "epoch_minutes": epoch_minutes(run, phase),
        "final_loss": phase.loss,
        "final_acc1": phase.acc1,
        "bytes_predicted": phase.predicted,
        "bytes_measured": phase.measured,
        **phase.peaks,
    }


# ---- words

def verdict(run: Run) -> str:
    """What became of the run, in a sentence."""
    reached = [phase.name for phase in run.phases]
    path = reached[0] if len(reached) == 1 else f"{', '.join(reached[:-1])} and {reached[-1]}"
    through = f"through the phase{'s' if len(reached) > 1 else ''} {path}"
    switches = "; ".join(f"{phase.name} began after step {phase.begins:,} because {_lower(phase.reason)}"
                         for phase in run.phases[1:4])
    more = f" ({switches})" if switches else ""
    if run.end is not None:
        return f"The run finished after step {run.steps:,}, {through}{more}."
    return (f"The run has not finished: its log ends at step {run.steps:,} ({_progress(run)}), {through}{more}; "
            "it is still training, was stopped, or crashed.")


def _lower(text: str) -> str:
    """``text`` as the end of a sentence; the name of an algorithm keeps its capital."""
    return text if text.startswith("Algorithm") else text[:1].lower() + text[1:]


def _progress(run: Run) -> str:
    if run.config is None:
        return f"epoch {run.epochs:.1f}"
    duration = run.config.train.duration
    done = run.steps if duration.unit == "step" else run.epochs
    return f"{done:,.{0 if duration.unit == 'step' else 1}f} of {duration}"


def not_run(run: Run) -> Iterator[str]:
    """Yield what has not been run or measured."""
    if run.end is None:
        yield "The run has not finished."
    if run.config is not None:
        reached = {phase.name for phase in run.phases}
        missing = [phase.name for phase in run.config.phase_list if phase.name not in reached]
        if missing:
            yield f"Not reached: {_counted('phase', missing)}."
    if "val/acc1" not in run.last:
        yield "No validation accuracy was logged."
    if run.accuracy is None:
        yield "The exported model was not evaluated (prelora evaluate)."
    if not any(column.startswith("device_peak") for phase in run.phases for column in phase.peaks):
        yield "No memory of a GPU was logged."


def _counted(what: str, names: Sequence[str]) -> str:
    return f"{what}{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _incidents(run: Run) -> Iterator[str]:
    """Yield what disturbed the run, oldest first within each kind."""
    for column, step in run.not_a_number.items():
        before = "" if column not in run.last else f"; the last number, {run.last[column]:.4g}, is of an earlier step"
        yield f"{column} is not a number from step {step:,} on{before}."
    yield from run.attempts
    for resume in run.resumes:
        ranks = "" if resume.world_size is None else f" on {resume.world_size} ranks"
        stage = "" if resume.zero_stage is None else f" at ZeRO stage {resume.zero_stage}"
        source = f" from {resume.checkpoint}" if resume.checkpoint else ""
        yield f"Resumed after step {resume.step:,}{source}{ranks}{stage}."
    for slow in run.stragglers[:MOST_STRAGGLERS]:
        state = "no longer slow" if slow.change == Change.ENDED else "slow"
        yield (f"Rank {slow.rank} on host {slow.host} was {state} at step {slow.step:,}: {slow.what} took "
               f"{slow.seconds * 1e3:.1f} ms per step, {slow.usual * 1e3:.1f} ms on the median rank.")
    if len(run.stragglers) > MOST_STRAGGLERS:
        yield f"{len(run.stragglers) - MOST_STRAGGLERS} more reports of slow ranks are in {run.folder.events.name}."
    if run.corrupt:
        samples = "1 sample" if run.corrupt == 1 else f"{run.corrupt:,} samples"
        yield f"{samples} could not be read; others took their place."


# ---- several runs

def _settings(first: Run, run: Run) -> list[str] | None:
    """The settings that affect training and differ between two runs, or None if a config is missing."""
    if first.config is None or run.config is None:
        return None
    one, other = (config.model_dump(mode="json") for config in (first.config, run.config))
    return [f"{key}: {_value(before)} -> {_value(after)}" for key, before, after in binding_differences(one, other)]


def _value(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _seeds(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Yield, for each group of runs that differ only by their seed, the mean and the standard deviation of finals.

    The deviation is that of a sample (n - 1).
    """
    groups: list[list[Run]] = []
    for run in runs:
        group = next((g for g in groups if _differ_by_seed(g[0], run)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    for group in groups:
        if len(group) < 2:
            continue
        statistics: dict[str, dict[str, float | int]] = {}
        for key in FINALS:
            values = [value for run in group if (value := _finals(run)[key]) is not None]
            if len(values) == len(group):
                statistics[key] = {"mean": mean(values), "sd": stdev(values)}
        yield {"runs": [run.label for run in group], "count": len(group), "finals": statistics}


def _differ_by_seed(one: Run, other: Run) -> bool:
    settings = _settings(one, other)
    return settings is not None and all(setting.partition(": ")[0] == SEED for setting in settings)


def _mixed(runs: Sequence[Run]) -> Iterator[str]:
    models = {str(run.config.model.model_dump(mode="json")) for run in runs if run.config is not None}
    if len(models) > 1:
        yield ("The runs have different models. Their curves are overlaid all the same; maps of layers are made for "
               "each run.")


# ---- the parts that page and Markdown share

def card(run: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows (label, text) of the card of a run in a `summary`."""
    finals = run["finals"]
    best = "" if run["best_acc1_at_step"] is None else f" (step {run['best_acc1_at_step']:,})"
    hosts = run["hosts"] if isinstance(run["hosts"], int) else \
        len(run["hosts"]) if isinstance(run["hosts"], list) else None
    hours = f"{finals['hours']:.4g}"
    device_hours = f", {finals['hours'] * run['ranks']:.3g} rank hours" if run["ranks"] else ""
    peak = run["peak_rss_bytes"]
    return [
        ("run name", run["name"] or NOT_LOGGED),
        ("final top-1", final_text("final_acc1", finals["final_acc1"])),
        ("best top-1", final_text("best_acc1", finals["best_acc1"]) + best),
        ("exported top-1", final_text("exported_acc1", finals["exported_acc1"])),
        ("steps and epochs", f"{finals['steps']:,} steps, {run['epochs']:.1f} epochs"),
        ("samples", NOT_LOGGED if run["samples"] is None else f"{run['samples']:,}"),
        ("hours of training", f"{hours} h{device_hours}"),
        ("hosts × ranks", f"hosts {hosts or NOT_LOGGED}, ranks {run['ranks'] or NOT_LOGGED}"),
        ("peak resident memory", NOT_LOGGED if peak is None else f"{peak / 2**30:.2f} GiB per rank"),
        ("command", _text(run["command"])),
        ("commit", _text(run["commit"])),
        ("versions", _text(run["versions"])),
        ("config hash", run["config_hash"] or NOT_LOGGED),
        ("folder", run["folder"]),
    ]


def _text(value: Any) -> str:
    if value is None:
        return NOT_LOGGED
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def final_text(key: str, value: float | None, *, difference: bool = False) -> str:
    """A number of the table of finals, with its unit; a difference of shares is in percentage points."""
    _, factor, digits, unit = FINALS[key]
    if value is None:
        return "-"
    unit = "points" if difference and unit == "%" else unit
    return f"{value * factor:{'+' if difference else ''},.{digits}f}{f' {unit}' if unit else ''}"


def finals_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of finals of a `summary`, with the differences to the first run and the seeds."""
    keys = [key for key in FINALS if any(run["finals"][key] is not None for run in result["runs"])]
    rows = []
    for run in result["runs"]:
        row = [run["run"]]
        for key in keys:
            difference = (run["difference_to_first"] or {}).get(key)
            beside = "" if difference is None else f" ({final_text(key, difference, difference=True)})"
            row.append(final_text(key, run["finals"][key]) + beside)
        rows.append(row)
    for group in result["seeds"]:
        row = [f"mean ± sd of {group['count']} seeds: {', '.join(group['runs'])}"]
        for key in keys:
            found = group["finals"].get(key)
            row.append("-" if found is None else f"{final_text(key, found['mean'])} ± {final_text(key, found['sd'])}")
        rows.append(row)
    return ["run", *(FINALS[key][0] for key in keys)], rows


def phases_table(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of the phases of a run in a `summary`."""
    head = ["phase", "steps", "trainable parameters", "step, ms", "images/s", "epoch, min", "loss", "top-1",
            "switch, s"]
    rows = []
    for phase in run["phases"]:
        last = phase["last_step"]
        rows.append([
            phase["phase"], "no step yet" if last is None else f"{phase['first_step']:,}-{last:,}",
            f"{phase['trainable_parameters']:,}", _number(phase["step_s_median"], ".1f", 1e3),
            _number(phase["img_s_median"], ",.0f"), _number(phase["epoch_minutes"], ".3g"),
            _number(phase["final_loss"], ".4f"), final_text("final_acc1", phase["final_acc1"]),
            _number(phase["switch_s"], ".1f")])
    return head, rows


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:{form}}"


def cell_text(cell: Cell) -> str:
    """A cell of a figure's table of numbers."""
    if cell is None:
        return "-"
    return f"{cell:.5g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell
