"""Find the checkpoint that a run resumes from, and read each rank's part of it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prelora_ds.core.codec import CodecError, from_json
from prelora_ds.core.layout import Layout
from prelora_ds.engine.engine import Counters
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
from prelora_ds.run.log import truncate_logs
from prelora_ds.run.run_state import RunState


@dataclass
class Checkpoint:
    """A checkpoint that was verified on all ranks.

    run: the state of the run. engine: this rank's part of the state of the engine.
    config: the config of the run that wrote it, as JSON.
    data: the fingerprints of that run's data sets, by config key.
    own: what the loop of a user saved with it.
    """

    folder: Path
    manifest: CheckpointManifest
    run: RunState
    engine: EngineState
    counters: Counters
    rng: str
    config: Mapping[str, Any]
    data: Mapping[str, str]
    own: Mapping[str, Any] = field(default_factory=dict)

    def belongs_to(self, folder: RunFolder) -> bool:
        """Whether this is a checkpoint of the run in ``folder``, and not of another run."""
        return root_of(self.folder).resolve() == folder.checkpoints.resolve()

    def restore_rng(self, seed: int) -> None:
        """Restore this rank's RNG state.

        If the world size changed, reseed from ``seed``, rank and step.
        """
        if self.manifest.world_size == dist.get_world_size():
            restore_rng(self.rng)
        else:
            seed_rng(seed, dist.get_rank(), self.run.step)


def resumable_checkpoints(folder: RunFolder, resume: str) -> list[Path]:
    """List the checkpoints that ``--resume`` allows for the run in ``folder``, newest first.

    resume: ``auto``, ``never`` or a path. A path names a checkpoint, or a run (its newest
        checkpoint). It is used once: repeating the command resumes the new run instead.

    Raises ConfigError if the path is neither a checkpoint nor a run with checkpoints.
    """
    if resume == "never":
        return []
    checkpoints = list_checkpoints(folder.checkpoints)
    origin = origin_of(folder)
    if resume == "auto":
        return checkpoints or ([] if origin is None else checkpoints_at(origin))
    if checkpoints and origin == str(Path(resume).resolve()):
        return checkpoints
    return checkpoints_at(resume)


def origin_of(folder: RunFolder) -> str | None:
    """Return the ``--resume`` path that the run in ``folder`` started from, or None."""
    if not folder.origin.is_file():
        return None
    return folder.origin.read_text(encoding="utf-8", errors="replace").strip() or None


def checkpoints_at(location: str, key: str = "--resume") -> list[Path]:
    """Return the checkpoint at a path, or the checkpoints of the run there, newest first.

    Raises ConfigError about ``key``.
    """
    path = Path(location)
    remedy = "name a run's folder, or one of its checkpoints/step-..."
    try:
        if (path / MANIFEST).is_file() and step_of(path) >= 0:
            return [path]
        checkpoints = list_checkpoints(RunFolder(path).checkpoints) or list_checkpoints(path)
    except OSError as exc:
        raise ConfigError(key, location, f"cannot be read ({exc.strerror})", remedy) from exc
    # An empty text (of a variable that is not set, say) must not mean the current folder.
    if not location or not checkpoints:
        raise ConfigError(
            key, location, "is neither a checkpoint nor a run with checkpoints", remedy
        )
    return checkpoints


def load_newest(
    folders: Sequence[Path], run: RunFolder, layout: Layout, say: Callable[[str], None], *, key: str = "--resume"
) -> Checkpoint | None:
    """Load the first of ``folders`` (as listed by rank 0) that verifies on every rank. Collective.

    Every rank verifies its share of the files and reads its part. All ranks skip a checkpoint that
    is broken on any rank, with a message. A checkpoint of another run than ``run`` provides its
    weights, but not what was measured under the settings of that run.

    key: the name by which the user gave the checkpoints, for messages.

    Returns None if there are no ``folders``. Raises ConfigError if none of them is intact, or one
    has another format.
    """
    listed: list[Any] = [list(folders)]
    dist.broadcast_object_list(listed, src=0)
    problems: list[str] = []
    for folder in listed[0]:
        checkpoint, problem = _try_to_read(folder, layout)
        votes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(votes, problem)
        refused = next((vote for vote in votes if isinstance(vote, ConfigError)), None)
        if refused is not None:
            raise refused
        problems += [str(vote) for vote in votes if vote is not None][:1]
        if checkpoint is not None and all(vote is None for vote in votes):
            if not checkpoint.belongs_to(run):
                checkpoint.run.forget_measurements()
            return checkpoint
        say(f"warning: skipping {folder.name}: {problems[-1]}")
    if listed[0]:
        raise ConfigError(
            key,
            str(listed[0][0]),
            f"no intact checkpoint found: {'; '.join(problems)}",
            "restore the files, choose another checkpoint with --resume PATH, or start over in a "
            "new run.output_dir" if key == "--resume" else "restore the files, or choose another checkpoint",
        )
    return None


def _try_to_read(folder: Path, layout: Layout) -> tuple[Checkpoint | None, Exception | None]:
    try:
        return read_checkpoint(folder, layout, dist.get_rank(), dist.get_world_size()), None
    except (BrokenCheckpointError, ConfigError, OSError) as exc:
        return None, exc


def read_checkpoint(folder: Path, layout: Layout, rank: int, world_size: int) -> Checkpoint:
    """Verify this rank's share of the checkpoint's files, and read its part of the state.

    Raises BrokenCheckpointError or OSError, and ConfigError if the checkpoint has another format.
    """
    manifest = CheckpointManifest.load(folder)
    share = slice(rank, None, world_size)
    check_name(folder, manifest)
    manifest.verify(folder, share)
    parts = [(folder, manifest.world_size)]
    if manifest.base is not None:
        path = root_of(folder) / manifest.base
        base = load_base(root_of(folder), manifest.base)
        base.verify(path, share)
        parts.append((path, base.world_size))
    for path, world in parts:
        last_part = part_name(world - 1, world)
        if not (path / last_part).is_file():
            raise BrokenCheckpointError(
                f"{path}: {last_part} is missing, but {MANIFEST} states {world} ranks"
            )

    document = read_run_state(folder)
    try:
        run = from_json(RunState, document["run"])
        counters = from_json(Counters, document["counters"])
        adam_steps = dict(document["adam_steps"])
        config = dict(document["config"])
        data = dict(document["data"])
        own = dict(document.get("own", {}))
        plan = run.phase.plan
        shapes = plan.parameters(layout)
        unknown = [*(plan.trainable - shapes.keys())]
        unknown += (plan.active or frozenset()) - plan.trainable
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a part of this model")
    except CodecError as exc:
        raise BrokenCheckpointError(f"{folder}: its state cannot be parsed: {exc}") from exc
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise BrokenCheckpointError(f"{folder}: its state cannot be parsed ({exc!r})") from exc
    elements = {name: math.prod(shape) for name, shape in shapes.items()}
    state, metadata = read_state(
        [path for path, _ in parts], [world for _, world in parts], elements, rank, world_size
    )
    if "rng" not in metadata:
        raise BrokenCheckpointError(
            f"{folder}: the state of the random number generators is missing"
        )
    state.adam_steps = adam_steps
    return Checkpoint(folder, manifest, run, state, counters, metadata["rng"], config, data, own)


def rewind_output(
    folder: RunFolder, checkpoint: Checkpoint | None, origin: str | None = None
) -> int:
    """Rewind the output folder to ``checkpoint``, or to the start; return its step. Collective.

    Rank 0 truncates the logs, sets later checkpoints aside and copies the base of another run's
    checkpoint (by links where possible).

    origin: the ``--resume`` path that named the checkpoint, or None.

    Raises ConfigError or DiskError on all ranks if the folder cannot be written.
    """
    step = 0 if checkpoint is None else checkpoint.run.step

    def act() -> None:
        try:
            _rewind(folder, checkpoint, step)
            # Record the origin only now, when the later rows and checkpoints are out of the way.
            if origin is not None:
                replace_file(folder.origin, origin + "\n")
        except OSError as exc:
            raise cannot_write("run.output_dir", folder.path, _first_error(exc)) from exc

    on_rank_0(act)
    return step


def _rewind(folder: RunFolder, checkpoint: Checkpoint | None, step: int) -> None:
    root = folder.checkpoints
    same_run = checkpoint is not None and checkpoint.belongs_to(folder)
    truncate_logs(folder, step if same_run else -1)
    later = [path for path in list_checkpoints(root) if checkpoint is None or step_of(path) > step]
    set_aside(root, later)
    if checkpoint is None or checkpoint.manifest.base is None:
        return
    source = root_of(checkpoint.folder) / checkpoint.manifest.base
    target = root / checkpoint.manifest.base
    if not target.exists():
        with new_folder(target, replace=True) as partial:
            shutil.copytree(source, partial, copy_function=_link_or_copy, dirs_exist_ok=True)


def _first_error(error: OSError) -> OSError:
    """Return the first error in ``error``; copytree collects the errors of all files as texts."""
    if isinstance(error, shutil.Error):
        first = error.args[0][0][2]
        number = next((number for number in DISK_FAULTS if os.strerror(number) in first), None)
        return OSError(number, first)
    return error


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # The target is on another file system.
        shutil.copy2(source, target)
