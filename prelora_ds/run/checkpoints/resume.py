"""Finding the checkpoint that a run goes on from, and reading each rank's part of it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prelora_ds.core.codec import CodecError, from_json
from prelora_ds.core.layout import Layout
from prelora_ds.engine.build import Counters
from prelora_ds.engine.rng import restore_rng, seed_rng
from prelora_ds.engine.runtime import on_rank_0
from prelora_ds.engine.state import EngineState
from prelora_ds.errors import DISK_FAULTS, ConfigError, cannot_write
from prelora_ds.files import new_folder, replace_file
from prelora_ds.run.checkpoints.checkpoint_folder import (
    MANIFEST,
    BrokenCheckpointError,
    CheckpointManifest,
    check_name,
    list_checkpoints,
    load_base,
    read_run_state,
    root_of,
    set_aside,
    step_of,
)
from prelora_ds.run.checkpoints.part import part_name, read_state
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import cut_back
from prelora_ds.run.run_state import RunState


@dataclass
class Checkpoint:
    """One that verified on all ranks: the run's state, and this rank's part of the engine's."""

    folder: Path
    manifest: CheckpointManifest
    run: RunState
    engine: EngineState
    counters: Counters
    rng: str

    def of_run(self, folder: RunFolder) -> bool:
        """Whether it is of the run in ``folder``, and not one that a new run begins from."""
        return root_of(self.folder).resolve() == folder.checkpoints.resolve()

    def restore_rng(self, seed: int) -> None:
        """Set this rank's generators: as they were, or in a world of another size anew, from seed, rank and step."""
        if self.manifest.world_size == dist.get_world_size():
            restore_rng(self.rng)
        else:
            seed_rng(seed, dist.get_rank(), self.run.step)


def candidates(folder: RunFolder, resume: str) -> list[Path]:
    """The checkpoints that ``--resume`` (auto, never or a path) allows in the run of ``folder``, newest first.

    A path names one checkpoint, or a run whose newest is meant, and is gone to once: the same command again goes on
    from what has come of it. Raises ConfigError when it names neither.
    """
    if resume == "never":
        return []
    own, origin = list_checkpoints(folder.checkpoints), origin_of(folder)
    if resume == "auto":
        return own or ([] if origin is None else checkpoints_at(origin))
    return own if own and origin == str(Path(resume).resolve()) else checkpoints_at(resume)


def origin_of(folder: RunFolder) -> str | None:
    """The path that the run of ``folder`` was told to go on from, if it was."""
    if not folder.origin.is_file():
        return None
    return folder.origin.read_text(encoding="utf-8", errors="replace").strip() or None


def checkpoints_at(place: str, key: str = "--resume") -> list[Path]:
    """The checkpoint at a path, or those of the run there. Raises ConfigError about ``key``."""
    path, remedy = Path(place), "name a run's folder, or one of its checkpoints/step-..."
    try:
        if (path / MANIFEST).is_file() and step_of(path) >= 0:
            return [path]
        found = list_checkpoints(RunFolder(path).checkpoints) or list_checkpoints(path)
    except OSError as exc:
        raise ConfigError(key, place, f"cannot be read ({exc.strerror})", remedy) from exc
    if not place or not found:  # an empty text, of a variable that is not set, is not this folder
        raise ConfigError(key, place, "is neither a checkpoint nor a run that has one", remedy)
    return found


def load_newest(folders: Sequence[Path], run: RunFolder, layout: Layout,
                say: Callable[[str], None]) -> Checkpoint | None:
    """The first of ``folders`` (rank 0's count) that every rank finds whole; None if there are none. Collective.

    One that is not of ``run`` itself brings its weights, and nothing that was measured by the other run's settings.

    Every rank verifies its share of the files and reads its part; one that is broken on any rank is passed over by all,
    with a message. Raises ConfigError when none is whole, or one is of another format.
    """
    listed: list[Any] = [list(folders)]
    dist.broadcast_object_list(listed, src=0)
    problems: list[str] = []
    for folder in listed[0]:
        found, problem = _attempt(folder, layout)
        votes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(votes, problem)
        refused = next((vote for vote in votes if isinstance(vote, ConfigError)), None)
        if refused is not None:
            raise refused
        problems += [str(vote) for vote in votes if vote is not None][:1]
        if found is not None and all(vote is None for vote in votes):
            if not found.of_run(run):
                found.run.forget_measurements()
            return found
        say(f"warning: {folder.name} is passed over: {problems[-1]}")
    if listed[0]:
        raise ConfigError("--resume", str(listed[0][0]), f"no checkpoint is whole: {'; '.join(problems)}",
                          "mend or restore the files, name another with --resume PATH, or begin anew in another "
                          "run.output_dir")
    return None


def _attempt(folder: Path, layout: Layout) -> tuple[Checkpoint | None, Exception | None]:
    try:
        return read_checkpoint(folder, layout, dist.get_rank(), dist.get_world_size()), None
    except (BrokenCheckpointError, ConfigError, OSError) as exc:
        return None, exc


def read_checkpoint(folder: Path, layout: Layout, rank: int, world_size: int) -> Checkpoint:
    """This rank's part of the checkpoint, its share of the files verified.

    Raises BrokenCheckpointError or OSError; ConfigError for another format.
    """
    manifest, share = CheckpointManifest.load(folder), slice(rank, None, world_size)
    check_name(folder, manifest)
    manifest.verify(folder, share)
    parts = [(folder, manifest.world_size)]
    if manifest.base is not None:
        path = root_of(folder) / manifest.base
        base = load_base(root_of(folder), manifest.base)
        base.verify(path, share)
        parts.append((path, base.world_size))
    for path, world in parts:
        if not (path / part_name(world - 1, world)).is_file():
            raise BrokenCheckpointError(f"{path}: is not the work of {world} ranks, as its {MANIFEST} says")
    document = read_run_state(folder)
    try:
        run, counters = from_json(RunState, document["run"]), from_json(Counters, document["counters"])
        adam_steps = dict(document["adam_steps"])
        plan = run.phase.plan
        shapes = plan.parameters(layout)
        if unknown := [*(plan.trainable - shapes.keys()), *((plan.active or frozenset()) - plan.trainable)]:
            raise ValueError(f"{unknown[0]!r} is not a part of this model")
    except CodecError as exc:
        raise BrokenCheckpointError(f"{folder}: its state cannot be understood: {exc}") from exc
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise BrokenCheckpointError(f"{folder}: its state cannot be understood ({exc!r})") from exc
    elements = {name: math.prod(shape) for name, shape in shapes.items()}
    state, metadata = read_state([path for path, _ in parts], [world for _, world in parts], elements, rank, world_size)
    if "rng" not in metadata:
        raise BrokenCheckpointError(f"{folder}: has no state of the random generators")
    state.adam_steps = adam_steps
    return Checkpoint(folder, manifest, run, state, counters, metadata["rng"])


def prepare(folder: RunFolder, checkpoint: Checkpoint | None, origin: str | None = None) -> int:
    """Make the run's folder fit to continue from ``checkpoint``, or to begin; returns the steps done.

    Rank 0 acts: rows of later steps leave the logs, and later checkpoints are set aside. A checkpoint
    of another run lends its base (by links, where these can be made). origin: the path that named the
    checkpoint, where one did.

    Collective. Raises ConfigError or DiskError on all ranks when the folder cannot be written.
    """
    done = 0 if checkpoint is None else checkpoint.run.step

    def act() -> None:
        try:
            _rewind(folder, checkpoint, done)
            if origin is not None:  # only now: what lies beyond the checkpoint is out of the way
                replace_file(folder.origin, origin + "\n")
        except OSError as exc:
            raise cannot_write("run.output_dir", folder.path, _first_error(exc)) from exc

    on_rank_0(act)
    return done


def _rewind(folder: RunFolder, checkpoint: Checkpoint | None, done: int) -> None:
    root = folder.checkpoints
    cut_back(folder, done if checkpoint is not None and checkpoint.of_run(folder) else -1)
    set_aside(root, [path for path in list_checkpoints(root) if checkpoint is None or step_of(path) > done])
    if checkpoint is None or checkpoint.manifest.base is None:
        return
    source, target = root_of(checkpoint.folder) / checkpoint.manifest.base, root / checkpoint.manifest.base
    if not target.exists():
        with new_folder(target, replace=True) as partial:
            shutil.copytree(source, partial, copy_function=_link_or_copy, dirs_exist_ok=True)


def _first_error(error: OSError) -> OSError:
    """What copytree, which collects the errors of all files as texts, says of the first."""
    if isinstance(error, shutil.Error):
        first = error.args[0][0][2]
        full = next((number for number in DISK_FAULTS if os.strerror(number) in first), None)
        return OSError(full, first)
    return error


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
