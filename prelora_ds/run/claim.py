"""Whether a run may have its output folder: a new one, or its own from before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelora_ds.config.changes import differences, may_differ, what_binds
from prelora_ds.config.load import dump_yaml, read_settings, validate
from prelora_ds.config.overrides import as_override
from prelora_ds.config.tree import Config
from prelora_ds.core.classes import classes_of, difference
from prelora_ds.core.controller import index_of
from prelora_ds.core.phases import difference as phases_differ
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
from prelora_ds.run.log import EventKind, check_logs, read_lines


@dataclass
class Claim:
    """An output folder that is this job's.

    sources: the checkpoints that it may go on from, newest first. origin: the path that named them, if one did.
    """

    lock: Lock
    sources: Sequence[Path]
    origin: str | None


def claim_output(folder: RunFolder, config: Config, resume: str, data: Mapping[str, str],
                 classes: Sequence[str] = (), *, steps: int) -> Claim:
    """Take the output folder for this job and write config.yaml into it; by rank 0, before anything expensive.

    data: what tells the data sets from others, by key.
    classes: theirs; none where they are not known.
    steps: those of the whole run.

    Raises LaunchError when a living job has the folder, an error of exit code 75 when its disk is
    full, and ConfigError when it holds something else than this run, unfinished, or cannot be
    written; then nothing in it has changed.
    """
    with _writing(folder.path), ExitStack() as refused:
        if folder.path.exists() and not folder.path.is_dir():
            raise ConfigError("run.output_dir", str(folder.path), "is not a folder",
                              "choose another run.output_dir")
        if folder.model.is_symlink() or (folder.model.exists() and not folder.model.is_dir()):
            raise ConfigError("run.output_dir", str(folder.path), f"has a file or link {folder.model.name}, where the "
                              "run will write the folder of its model",
                              "remove or rename it, or choose another run.output_dir")
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder.lock).take()
        refused.callback(lock.release)
        begun = _check_folder(folder, config, resume)
        check_logs(folder)
        sources = resumable_checkpoints(folder, resume)
        new_run = bool(sources) and root_of(sources[0]).resolve() != folder.checkpoints.resolve()
        origin = None if resume in ("auto", "never") else str(Path(resume).resolve())
        if begun and new_run and origin not in (None, origin_of(folder)):
            raise ConfigError("--resume", resume, f"is of another run, and {folder.path} holds one already",
                              "choose another run.output_dir")
        if begun and (new_run or not sources):
            _check_not_lost(folder)
        _check_sources(sources, config, data, classes, new_run=new_run, steps=steps)
        discard_partial(folder.checkpoints)
        if list_checkpoints(folder.checkpoints):
            folder.saved.touch()  # version 0.1.0 did not write it
        elif not begun:
            folder.saved.unlink(missing_ok=True)
        if new_run and origin is not None:
            replace_file(folder.origin, origin + "\n")
        elif not begun and resume == "never":
            folder.origin.unlink(missing_ok=True)
        replace_file(folder.config, dump_yaml(config))
        refused.pop_all()
        return Claim(lock, sources, origin)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise cannot_write("run.output_dir", str(folder), exc) from exc


def _check_folder(folder: RunFolder, config: Config, resume: str) -> bool:
    """Hold what is in the folder against this run; whether a run has begun in it, and not only been refused."""
    before_it_begins = (folder.lock.name, f".{folder.config.name}", f".{folder.origin.name}")
    held = {path.name for path in folder.path.iterdir() if not path.name.startswith(before_it_begins)}
    begun = bool(held - {folder.config.name, folder.origin.name, folder.saved.name})
    own = folder.config.is_file()
    if begun and (resume == "never" or not own):
        what = "holds another run" if own else "exists and is not empty"
        raise ConfigError("run.output_dir", str(folder.path), what,
                          "choose another run.output_dir, or move this one away")
    if is_finished(folder):
        raise ConfigError("run.output_dir", str(folder.path), "holds a finished run",
                          "choose another run.output_dir; `prelora report` prints what came of this one")
    if own:
        # Also where no run has begun: the file may be somebody else's.
        before = _stored(read_settings(folder.config), config, folder.config, new_run=False)
        if begun:
            whole = bool(list_checkpoints(folder.checkpoints))
            _same(before, config, folder.path, new_run=False, checkpoint=folder.path if whole else None)
    return begun


def _check_not_lost(folder: RunFolder) -> None:
    """Refuse to begin anew where checkpoints were written and are gone.

    To begin would delete the rows of the logs. Raises ConfigError.
    """
    if folder.saved.exists() and not list_checkpoints(folder.checkpoints):
        raise ConfigError("run.output_dir", str(folder.path),
                          "holds the logs of a run whose checkpoints were removed from "
                          f"{folder.checkpoints.name}/",
                          f"put the checkpoints back; or, to begin anew, move {folder.path} away or "
                          "choose another run.output_dir")


def _check_sources(sources: Sequence[Path], config: Config, data: Mapping[str, str],
                   classes: Sequence[str], *, new_run: bool, steps: int) -> None:
    """Hold settings, classes and data against those of the newest checkpoint that can be read.

    The others are told when they are loaded. A new run may have other data, but of the same classes:
    the head of the checkpoint has a row for each. It has to last longer than to its checkpoint.
    """
    for source in sources:
        try:
            state = read_run_state(source)
            before, trained_on, known = state["config"], dict(state["data"]), classes_of(state)
            step = int(state["run"]["step"])
        except (BrokenCheckpointError, KeyError, TypeError, ValueError):
            continue
        if not isinstance(before, dict):
            continue
        _same(_stored(before, config, source, new_run=new_run), config, source, new_run=new_run,
              checkpoint=source)
        whose = f"the checkpoint {source}"
        if classes and known and (problem := difference(classes, known, whose)):
            raise ConfigError("data.train", config.data.train, problem,
                              "name data of the classes that the checkpoint was trained on, or begin "
                              "without it in another run.output_dir")
        if new_run:
            _check_fork(state, config, source)
        if new_run and step >= steps:
            raise ConfigError("train.duration", str(config.train.duration),
                              f"ends the run after step {steps}, and the checkpoint {source} is of "
                              f"step {step} already", "choose a longer train.duration, or name an "
                              "earlier checkpoint with --resume")
        for key in () if new_run else sorted(data.keys() & trained_on.keys()):
            if data[key] != trained_on[key]:
                raise ConfigError(key, config.data.train if key == "data.train" else config.data.val,
                                  f"has {data[key]}, and the run in {source} {trained_on[key]}",
                                  "name the data that the run began with, wherever it lies, or choose another "
                                  f"run.output_dir and begin it with --resume {source}")
        return


def _check_fork(state: Mapping[str, Any], config: Config, source: Path) -> None:
    """Compare the phases that the checkpoint has behind it with those of a new run. Raises ConfigError."""
    bound = what_binds(state["config"], config.model_dump(mode="json"))
    before = _read(bound, config, source).specs()
    try:
        index = index_of(state["run"]["phase"])
        begun = before[index].name
    except (KeyError, TypeError, ValueError, IndexError):
        return  # told when it is loaded
    found = phases_differ(before, config.specs(), index)
    if found is not None:
        raise ConfigError(f"phases.{found.phase}.{found.key}", found.after,
                          f"was {found.before} in the run of {source}, which is in phase {begun}",
                          "keep the phases as they are there up to the end of that one, or begin from an earlier "
                          "checkpoint")


def is_finished(folder: RunFolder) -> bool:
    """Whether the run in ``folder`` came to its end. Raises ConfigError when its log is damaged."""
    events = folder.events_to_read
    return events.is_file() and any(row.get("event") == EventKind.END for row in read_lines(events))


def _stored(values: Mapping[str, Any], config: Config, where: Path, *,
            new_run: bool) -> dict[str, Any]:
    """The config of a stored run as this version has it, perhaps a later one than wrote it.

    Keys that are missing have their defaults. Raises ConfigError.
    """
    bound = what_binds(values, config.model_dump(mode="json"), new_run=new_run)
    return _read(bound, config, where).model_dump(mode="json")


def _read(values: Mapping[str, Any], config: Config, where: Path) -> Config:
    """The stored ``values`` as a config of this version. Raises ConfigError for what it does not take."""
    try:
        return validate(values, str(where))
    except ConfigError as exc:
        raise ConfigError("run.output_dir", config.run.output_dir,
                          f"{where} holds settings that this version of prelora_ds does not take: "
                          f"{exc.key} = {exc.value!r} {exc.problem}",
                          "continue with the version that wrote them, or choose another "
                          "run.output_dir") from exc


def _same(before: Mapping[str, Any], config: Config, where: Path, *, new_run: bool,
          checkpoint: Path | None) -> None:
    """checkpoint: what a new run with other settings may begin from, if there is one."""
    after = config.model_dump(mode="json")
    for key, old, new in differences(before, after, new_run=new_run):
        other = "choose another run.output_dir"
        if checkpoint is not None and not new_run and may_differ(key, new_run=True):
            other += f" and begin it with --resume {checkpoint}"
        raise ConfigError(key, new, f"was {old!r} in {where}, and a resumed run keeps it",
                          f"set {as_override(key, old)}, or {other}")
