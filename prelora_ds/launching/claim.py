"""Whether a run may have its output folder: a new one, or its own from before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelora_ds.checkpoints.folder import (
    FOLDER,
    BrokenCheckpointError,
    discard_partial,
    read_run_state,
    root_of,
    write_text,
)
from prelora_ds.checkpoints.resume import ORIGIN, candidates, origin_of
from prelora_ds.configuring import dump_yaml, load_config
from prelora_ds.core.classes import classes_of, difference
from prelora_ds.core.config import Config
from prelora_ds.core.errors import ConfigError, cannot_write
from prelora_ds.core.resuming import differences
from prelora_ds.launching.lease import NAME, Lease
from prelora_ds.metrics import check_logs, read_lines

CONFIG = "config.yaml"


@dataclass
class Claim:
    """An output folder that is this job's.

    sources: the checkpoints that it may go on from, newest first. origin: the path that named them, if one did.
    """

    lease: Lease
    sources: Sequence[Path]
    origin: str | None


def claim_output(folder: Path, config: Config, resume: str, data: Mapping[str, str],
                 classes: Sequence[str] = ()) -> Claim:
    """Take the output folder for this job and write config.yaml into it; by rank 0, before anything expensive.

    data: what tells the data sets from others, by key.
    classes: theirs; none where they are not known.

    Raises LaunchError when a living job has the folder, NotSavedError when its disk is full, and
    ConfigError when it holds something else than this run, unfinished, or cannot be written; then
    nothing in it has changed.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError("run.output_dir", str(folder), "is no folder", "choose another run.output_dir")
    with _writing(folder), ExitStack() as refused:
        folder.mkdir(parents=True, exist_ok=True)
        lease = Lease(folder).take()
        refused.callback(lease.release)
        begun = _check_folder(folder, config, resume)
        check_logs(folder)
        sources = candidates(folder, resume)
        new_run = bool(sources) and root_of(sources[0].resolve()) != (folder / FOLDER).resolve()
        origin = None if resume in ("auto", "never") else str(Path(resume).resolve())
        if begun and new_run and origin not in (None, origin_of(folder)):
            raise ConfigError("--resume", resume, f"is of another run, and {folder} holds one already",
                              "choose another run.output_dir")
        _check_sources(sources, config, data, classes, new_run=new_run)
        discard_partial(folder / FOLDER)
        if new_run and origin is not None:
            write_text(folder / ORIGIN, origin + "\n")
        elif not begun and resume == "never":
            (folder / ORIGIN).unlink(missing_ok=True)
        write_text(folder / CONFIG, dump_yaml(config))
        refused.pop_all()
        return Claim(lease, sources, origin)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise cannot_write("run.output_dir", str(folder), exc) from exc


def _check_folder(folder: Path, config: Config, resume: str) -> bool:
    """Hold what is in the folder against this run; whether a run has begun in it, and not only been refused."""
    held = {path.name for path in folder.iterdir() if not path.name.startswith((NAME, f".{CONFIG}", f".{ORIGIN}"))}
    own, begun = (folder / CONFIG).is_file(), bool(held - {CONFIG, ORIGIN})
    if begun and (resume == "never" or not own):
        what = "holds another run" if own else "exists and is not empty"
        raise ConfigError("run.output_dir", str(folder), what, "choose another run.output_dir, or move this one away")
    if is_finished(folder):
        raise ConfigError("run.output_dir", str(folder), "holds a finished run",
                          "choose another run.output_dir; `prelora report` prints what came of this one")
    if own:
        before = load_config(folder / CONFIG).model_dump(mode="json")  # raises where the file is somebody else's
        if begun:
            _same(before, config, folder, new_run=False)
    return begun


def _check_sources(sources: Sequence[Path], config: Config, data: Mapping[str, str],
                   classes: Sequence[str], *, new_run: bool) -> None:
    """Hold settings, classes and data against those of the newest checkpoint that can be read.

    The others are told when they are loaded. A new run may have other data, but of the same classes:
    the head of the checkpoint has a row for each.
    """
    for source in sources:
        try:
            state = read_run_state(source)
            before, trained_on, known = state["config"], state["data"], classes_of(state)
        except (BrokenCheckpointError, KeyError, TypeError):
            continue
        _same(before, config, source, new_run=new_run)
        whose = f"the checkpoint {source}"
        if classes and known and (problem := difference(classes, known, whose)):
            raise ConfigError("data.train", config.data.train, problem,
                              "name data of the classes that the checkpoint was trained on, or begin "
                              "without it in another run.output_dir")
        for key in () if new_run else sorted(data.keys() & trained_on.keys()):
            if data[key] != trained_on[key]:
                raise ConfigError(key, config.data.train if key == "data.train" else config.data.val,
                                  f"has {data[key]}, and the run in {source} {trained_on[key]}",
                                  "name the data that the run began with, wherever it lies, or choose another "
                                  f"run.output_dir and begin it with --resume {source}")
        return


def is_finished(folder: Path) -> bool:
    """Whether the run in ``folder`` came to its end."""
    plans = folder / "plans.jsonl"
    return plans.is_file() and any(row.get("event") == "end" for row in read_lines(plans))


def _same(before: Mapping[str, Any], config: Config, where: Path, *, new_run: bool) -> None:
    for key, old, new in differences(before, config.model_dump(mode="json"), new_run=new_run):
        raise ConfigError(key, new, f"was {old!r} in {where}, and a resumed run keeps it",
                          f"set {key}={old}, or choose another run.output_dir"
                          + ("" if new_run else " and begin it with --resume " + str(where)))
