"""Claim the output folder for a job: a new folder, or the one of the run that the job resumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelora_ds.config.changes import binding_differences, may_differ
from prelora_ds.config.load import dump_yaml, read_settings
from prelora_ds.config.overrides import as_override
from prelora_ds.config.tree import Config
from prelora_ds.core.classes import classes_of, difference
from prelora_ds.errors import ConfigError, cannot_write
from prelora_ds.files import replace_file
from prelora_ds.hosts.lock import Lock
from prelora_ds.run.checkpoints.checkpoint_folder import (
    BrokenCheckpointError,
    discard_partial,
    list_checkpoints,
    read_run_state,
    root_of,
)
from prelora_ds.run.checkpoints.resume import origin_of, resumable_checkpoints
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.forks import check_fork
from prelora_ds.run.log import EventKind, check_logs, read_lines
from prelora_ds.run.stored import settings_of


@dataclass
class Claim:
    """An output folder that this job holds.

    resume_candidates: the checkpoints that the run may resume from, newest first.
    resumed_from: the ``--resume`` path that named them, or None.
    """

    lock: Lock
    resume_candidates: Sequence[Path]
    resumed_from: str | None


def claim_output(
    folder: RunFolder,
    config: Config,
    resume: str,
    data: Mapping[str, str],
    classes: Sequence[str] = (),
    *,
    steps: int,
) -> Claim:
    """Claim the output folder for this job and write config.yaml into it.

    Rank 0 calls it before anything expensive.

    data: the fingerprints of the data sets, by config key.
    classes: the class names of the data; empty if they are not known.
    steps: the number of steps of the whole run.

    Raises LaunchError if a running job holds the folder, an error with exit code 75 if its disk is
    full, and ConfigError if the folder cannot be written or contains anything else than this run,
    unfinished. After an error nothing in the folder has changed.
    """
    with _report_write_errors(folder.path), ExitStack() as on_refusal:
        _check_paths(folder)
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder.lock).take()
        on_refusal.callback(lock.release)
        started = _check_folder(folder, config, resume)
        check_logs(folder)
        candidates = resumable_checkpoints(folder, resume)
        new_run = False
        if candidates:
            new_run = root_of(candidates[0]).resolve() != folder.checkpoints.resolve()
        origin = None if resume in ("auto", "never") else str(Path(resume).resolve())
        if started and new_run and origin not in (None, origin_of(folder)):
            raise ConfigError(
                "--resume",
                resume,
                f"belongs to another run, and {folder.path} already holds a run",
                "choose another run.output_dir",
            )
        if started and (new_run or not candidates):
            _check_checkpoints_not_lost(folder)
        _check_candidates(candidates, config, data, classes, new_run=new_run, steps=steps)

        discard_partial(folder.checkpoints)
        if list_checkpoints(folder.checkpoints):
            folder.saved.touch()  # version 0.1.0 did not write it
        elif not started:
            folder.saved.unlink(missing_ok=True)
        if new_run and origin is not None:
            replace_file(folder.origin, origin + "\n")
        elif not started and resume == "never":
            folder.origin.unlink(missing_ok=True)
        replace_file(folder.config, dump_yaml(config))
        on_refusal.pop_all()
        return Claim(lock, candidates, origin)


@contextmanager
def _report_write_errors(folder: Path) -> Iterator[None]:
    """Raise an OSError of the body as an error about ``run.output_dir``."""
    try:
        yield
    except OSError as exc:
        raise cannot_write("run.output_dir", str(folder), exc) from exc


def _check_paths(folder: RunFolder) -> None:
    """Raise ConfigError if a file is where the run needs its output folder or its model folder."""
    if folder.path.exists() and not folder.path.is_dir():
        raise ConfigError(
            "run.output_dir",
            str(folder.path),
            "is not a folder",
            "choose another run.output_dir",
        )
    if folder.model.is_symlink() or (folder.model.exists() and not folder.model.is_dir()):
        raise ConfigError(
            "run.output_dir",
            str(folder.path),
            f"contains a file or link named {folder.model.name}, where the run will write the "
            "folder of its model",
            "remove or rename it, or choose another run.output_dir",
        )


def _check_folder(folder: RunFolder, config: Config, resume: str) -> bool:
    """Check that the folder belongs to this run; return whether a run has started in it.

    A run that was refused before its start leaves files, too, but has not started. Raises
    ConfigError.
    """
    before_start = (folder.lock.name, f".{folder.config.name}", f".{folder.origin.name}")
    names = {
        path.name for path in folder.path.iterdir() if not path.name.startswith(before_start)
    }
    started = bool(names - {folder.config.name, folder.origin.name, folder.saved.name})
    has_config = folder.config.is_file()
    if started and (resume == "never" or not has_config):
        raise ConfigError(
            "run.output_dir",
            str(folder.path),
            "holds another run" if has_config else "exists and is not empty",
            "choose another run.output_dir, or move this one away",
        )
    if is_finished(folder):
        raise ConfigError(
            "run.output_dir",
            str(folder.path),
            "holds a finished run",
            "choose another run.output_dir; see `prelora report` for its results",
        )
    if has_config:
        # Read it even if no run has started: the file may be somebody else's.
        stored = read_settings(folder.config)
        before = settings_of(stored, config, folder.config, new_run=False)
        if started:
            checkpoint = folder.path if list_checkpoints(folder.checkpoints) else None
            _check_same_settings(before, config, folder.path, new_run=False, checkpoint=checkpoint)
    return started


def _check_checkpoints_not_lost(folder: RunFolder) -> None:
    """Refuse to start over where checkpoints were written and are gone.

    Starting over would delete the rows of the logs. Raises ConfigError.
    """
    if folder.saved.exists() and not list_checkpoints(folder.checkpoints):
        raise ConfigError(
            "run.output_dir",
            str(folder.path),
            "holds the logs of a run whose checkpoints were removed from "
            f"{folder.checkpoints.name}/",
            f"put the checkpoints back; to start over, move {folder.path} away or choose another "
            "run.output_dir",
        )


def _check_candidates(
    candidates: Sequence[Path],
    config: Config,
    data: Mapping[str, str],
    classes: Sequence[str],
    *,
    new_run: bool,
    steps: int,
) -> None:
    """Compare settings, classes and data with those of the newest checkpoint that can be read.

    Problems of the other checkpoints are reported when they are loaded. A new run may use other
    data, but the classes must be the same, because the head of the checkpoint has one row per
    class; and it must last longer than the step of its checkpoint. Raises ConfigError.
    """
    for candidate in candidates:
        try:
            state = read_run_state(candidate)
            before = state["config"]
            trained_on = dict(state["data"])
            known_classes = classes_of(state)
            step = int(state["run"]["step"])
        except (BrokenCheckpointError, KeyError, TypeError, ValueError):
            continue
        if not isinstance(before, dict):
            continue
        stored = settings_of(before, config, candidate, new_run=new_run)
        _check_same_settings(stored, config, candidate, new_run=new_run, checkpoint=candidate)

        if classes and known_classes:
            problem = difference(classes, known_classes, f"the checkpoint {candidate}")
            if problem:
                raise ConfigError(
                    "data.train",
                    config.data.train,
                    problem,
                    "use data with the classes of the checkpoint, or start a run without it in "
                    "another run.output_dir",
                )
        if not new_run:
            _check_same_data(data, trained_on, config, candidate)
            return
        check_fork(state, config, candidate)
        if step >= steps:
            raise ConfigError(
                "train.duration",
                str(config.train.duration),
                f"ends the run after step {steps}, but the checkpoint {candidate} is already at "
                f"step {step}",
                "choose a longer train.duration, or an earlier checkpoint with --resume",
            )
        return


def _check_same_data(
    data: Mapping[str, str], trained_on: Mapping[str, str], config: Config, checkpoint: Path
) -> None:
    """Raise ConfigError if the fingerprint of a data set differs from the checkpoint's."""
    for key in sorted(data.keys() & trained_on.keys()):
        if data[key] != trained_on[key]:
            raise ConfigError(
                key,
                config.data.train if key == "data.train" else config.data.val,
                f"is {data[key]}, but the run in {checkpoint} used {trained_on[key]}",
                "use the run's original data, or start a new run in another run.output_dir with "
                f"--resume {checkpoint}",
            )


def is_finished(folder: RunFolder) -> bool:
    """Whether the run in ``folder`` has finished. Raises ConfigError if its log is damaged."""
    events = folder.events_to_read
    return events.is_file() and any(
        row.get("event") == EventKind.END for row in read_lines(events)
    )


def _check_same_settings(
    before: Mapping[str, Any],
    config: Config,
    where: Path,
    *,
    new_run: bool,
    checkpoint: Path | None,
) -> None:
    """Compare the settings with those ``before``, stored ``where``. Raises ConfigError.

    checkpoint: what a new run with other settings may start from, if anything.
    """
    after = config.model_dump(mode="json")
    for key, old, new in binding_differences(before, after, new_run=new_run):
        alternative = "choose another run.output_dir"
        if checkpoint is not None and not new_run and may_differ(key, new_run=True):
            alternative += f" and start a new run with --resume {checkpoint}"
        raise ConfigError(
            key,
            new,
            f"was {old!r} in {where} and cannot change when resuming",
            f"set {as_override(key, old)}, or {alternative}",
        )
