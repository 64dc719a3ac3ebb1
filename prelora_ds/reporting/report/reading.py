"""Read the whole history of a run from its logs, row by row and in bounded memory.

A report is often made of a run that crashed, so a damaged line is passed by and named in the report.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from prelora_ds.config.load import load_config
from prelora_ds.config.tree import Config
from prelora_ds.core.switch_tests.prelora import WindowStats, partially_converged
from prelora_ds.errors import ConfigError
from prelora_ds.hosts.diagnosis import succeeded
from prelora_ds.hosts.heartbeat import attempt_of, read_json
from prelora_ds.hosts.hostfile import read_hostfile
from prelora_ds.reporting.history import (
    Active,
    Bytes,
    End,
    Event,
    Merged,
    Pruned,
    Resume,
    Slow,
    Started,
    find_logs,
    finite,
    parse_event,
    parse_step,
)
from prelora_ds.reporting.report.run import Phase, Run, linear_of, mean_of, tests_of
from prelora_ds.run.accuracy import read_accuracy
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import stream_lines
from prelora_ds.run.setup_record import read_setup

MOST_NOTES = 10  # of one file
# What is logged about each job, under these keys of an event.
FACTS = ("command", "commit", "versions", "hosts", "world_size")


def read_run(folder: RunFolder, label: str) -> Run:
    """Read the run in ``folder``.

    Raises ConfigError if there is no run, if its events do not state when a phase began, if it has not logged a step,
    or if a file cannot be read at all.
    """
    metrics, events = find_logs(folder)
    run = Run(label, folder, *_config(folder))
    if run.config is None:
        run.notes.append("config.yaml cannot be understood or is missing; what depends on it is left out.")
    measured = _read_events(run, events)
    if not run.phases:
        raise ConfigError("RUN", str(folder.path), f"its {events.name} does not state when a phase began",
                          "restore that file; checkpoints and model are not affected")
    _read_metrics(run, metrics)
    if not run.steps:
        raise ConfigError("RUN", str(folder.path), "contains a run that has not logged a step yet",
                          "try again later, or start the run again if it has ended")
    for event in measured:
        phase = next((p for p in reversed(run.phases) if p.begins < event.step), run.phases[0])
        if phase.predicted is None:
            phase.predicted, phase.measured = event.predicted, event.measured
    for merge in run.merges:
        for column, value in (("merge output change", merge.output_change), ("merge reset share", merge.reset_share)):
            if value is not None:
                run.curve(column).add(merge.step, run.hours_at(merge.step), value)
    if folder.windows.is_file():
        _read_windows(run)
    if folder.accuracy.is_file():
        try:
            run.accuracy = read_accuracy(folder.accuracy)
        except ConfigError as error:
            run.notes.append(f"model/accuracy.json {error.problem}.")
    try:
        setup = read_setup(folder)
    except ConfigError as error:
        run.notes.append(f"{folder.setup.name} {_short(error.problem)}.")
    else:
        run.world_size = None if setup is None else setup.world_size
    _read_attempts(run)
    return run


def _config(folder: RunFolder) -> tuple[Config | None, str | None]:
    """The config of the run and a hash of its file; None for what is missing or was made by another version."""
    try:
        digest = hashlib.sha256(folder.config.read_bytes()).hexdigest()[:12]
    except OSError:
        return None, None
    try:
        return load_config(folder.config), digest
    except ConfigError:
        return None, digest


def _passing_by(run: Run, path: Path) -> Callable[[ConfigError], None]:
    """Return a function that notes a damaged line of ``path``."""
    count = 0

    def note(error: ConfigError) -> None:
        nonlocal count
        count += 1
        if count <= MOST_NOTES:
            run.notes.append(f"{path.name}: {_short(error.problem)}; the line is passed by.")
        elif count == MOST_NOTES + 1:
            run.notes.append(f"{path.name}: further damaged lines are passed by.")

    return note


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."


def _read_events(run: Run, path: Path) -> list[Bytes]:
    measured: list[Bytes] = []
    pass_by = _passing_by(run, path)
    for number, row in stream_lines(path, pass_by):
        try:
            event = parse_event(row, path, number)
        except ConfigError as error:
            pass_by(error)
            continue
        run.facts |= {key: row[key] for key in FACTS if row.get(key) is not None}
        if isinstance(event, Bytes):
            measured.append(event)
        else:
            _add_event(run, event)
    return measured


def _add_event(run: Run, event: Event) -> None:
    match event:
        case Started():
            _add_plan(run, event)
        case Resume():
            if not run.phases:  # a fork: it begins with a checkpoint of another run
                run.first_step = event.step
            run.resumes.append(event)
        case Merged():
            run.merges.append(event)
        case Active():
            run.active.append(event)
        case Pruned():
            if run.phases:
                _add_ranks(run.phases[-1], event.step, _by_linear(run, event.remaining))
        case Slow():
            run.stragglers.append(event)
        case End():
            run.end = event


def _add_plan(run: Run, event: Started) -> None:
    """Begin a phase, or note that the plan has changed within a phase, for example the ranks of its adapters."""
    seconds = None if event.switch is None else event.switch.seconds
    last = run.phases[-1] if run.phases else None
    ranks = _by_linear(run, event.ranks)
    if last is not None and last.ranks and event.ranks == run.planned_ranks:
        ranks = last.ranks[-1][1]  # a plan does not say which components AdaLoRA has pruned
    run.planned_ranks = event.ranks
    if last is None or last.name != event.phase:
        run.phases.append(last := Phase(event.phase, event.step, event.reason, event.trainable_parameters,
                                        event.all_parameters, seconds, []))
    elif seconds is not None:
        last.switch_s = (last.switch_s or 0.0) + seconds
    _add_ranks(last, event.step, ranks)


def _add_ranks(phase: Phase, step: int, ranks: Mapping[tuple[str, int], int]) -> None:
    """Note the ranks of the adapters after ``step`` if they have changed in this phase."""
    if ranks and (not phase.ranks or phase.ranks[-1][1] != ranks):
        phase.ranks.append((step + 1, ranks))


def _by_linear(run: Run, ranks: Mapping[str, int]) -> Mapping[tuple[str, int], int]:
    return {linear_of(run, path): rank for path, rank in ranks.items()}


def _read_metrics(run: Run, path: Path) -> None:
    pass_by = _passing_by(run, path)
    before = run.first_step
    for number, row in stream_lines(path, pass_by):
        try:
            step = parse_step(row, path, number)
            if step.step <= run.steps:
                raise ConfigError("log", str(path), f"line {number} has step {step.step} again, or too late", "")
        except ConfigError as error:
            pass_by(error)
            continue
        phase = next((p for p in reversed(run.phases) if p.begins < step.step), run.phases[0])
        if phase.ends == 0 and phase.switch_s is not None:
            run.hours += phase.switch_s / 3600
        run.hours += ((step.step_s or 0.0) + (step.data_s or 0.0)) * max(step.step - before, 0) / 3600
        before = run.steps = phase.ends = step.step
        run.epochs = step.epoch
        _add_columns(run, phase, row)
        if step.loss is not None:
            phase.loss = step.loss
        if step.acc1 is not None:
            phase.acc1 = step.acc1
            if run.best is None or step.acc1 > run.best[0]:
                run.best = step.acc1, step.step


def _add_columns(run: Run, phase: Phase, row: Mapping[str, Any]) -> None:
    step = run.steps
    norms: dict[str, list[float]] = {}
    for column, value in row.items():
        number = finite(value)
        if column == "step":
            continue
        if number is None:
            if column in ("train/loss", "val/acc1", "val/loss"):
                run.not_a_number.setdefault(column, step)
            continue
        run.not_a_number.pop(column, None)
        mean = mean_of(column)
        if mean is not None:
            norms.setdefault(mean, []).append(number)
        run.add(column, step, number)
        run.last[column] = number
        if column in ("step_s", "data_s", "img_s"):
            getattr(phase, column).append(number)
        elif column.endswith("peak_gib"):
            phase.peaks[column] = max(number, phase.peaks.get(column, number))
    step_s, data_s = finite(row.get("step_s")), finite(row.get("data_s"))
    if step_s is not None and data_s is not None and step_s + data_s > 0:
        run.add("data wait", step, 100 * data_s / (step_s + data_s))
    run.corrupt += int(finite(row.get("data/corrupt")) or 0)
    for column, values in norms.items():
        run.add(column, step, fmean(values))


def _read_windows(run: Run) -> None:
    """Add the changes between successive windows, as Algorithm 1 calculates them."""
    path = run.folder.windows
    pass_by = _passing_by(run, path)
    test = next(iter(tests_of(run).values()), None)
    aggregate, joined = ("norm_of_mean", {}) if test is None else (test.aggregate, test.joined)
    before: WindowStats | None = None
    for number, row in stream_lines(path, pass_by):
        try:
            norms = {family: {int(layer): float(norm) for layer, norm in layers.items()}
                     for family, layers in row["norms"].items()}
            window = WindowStats(int(row["index"]), int(row["last_step"]), float(row["loss"]), norms)
            if before is not None and window.index == before.index + 1:
                changes = partially_converged([before, window], k=2, tau=1, zeta=1, aggregate=aggregate,
                                             joined=joined)
                named = {family: change for family, (change,) in changes.norm_changes.items()}
                for what, change in (named | {"loss": changes.loss_changes[0]}).items():
                    if finite(change) is not None:
                        run.curve(f"change/{what}").add(window.last_step, run.hours_at(window.last_step), change)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as exc:
            pass_by(ConfigError("log", str(path), f"line {number} cannot be understood ({exc})", ""))
            continue
        before = window


def _read_attempts(run: Run) -> None:
    """Describe the attempts of `prelora supervise`, whose folder lies next to the run's."""
    try:
        folders = [path for path in RunFolder(run.folder.path.resolve()).supervise.iterdir() if attempt_of(path)]
    except OSError:
        return
    for folder in sorted(folders, key=lambda path: attempt_of(path) or 0):
        failure = read_json(folder / "failure.json")
        if failure:
            how = f"failed with exit code {failure.get('code')}: {_short(str(failure.get('why')))}"
        elif succeeded(folder):
            how = "succeeded" if (folder / "DONE").exists() else "stopped with a checkpoint, as requested"
        else:
            how = "has not ended, or left no record of its end"
        run.attempts.append(f"Attempt {attempt_of(folder)} {how}.")
        try:
            run.attempt_hosts = len(read_hostfile(folder / "hostfile"))
        except ConfigError:
            continue
