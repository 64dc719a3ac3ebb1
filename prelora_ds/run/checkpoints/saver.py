"""Writing checkpoints: a copy on the host, a thread that writes it, a vote of all ranks, and only then a name."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prelora_ds.config.tree import Config
from prelora_ds.core.codec import to_json
from prelora_ds.core.plan import Plan
from prelora_ds.core.schedule import Timeline
from prelora_ds.engine.build import Engine
from prelora_ds.engine.rng import capture_rng
from prelora_ds.engine.state import EngineState, Slice, copy_state
from prelora_ds.errors import NotSavedError, Stopped
from prelora_ds.files import replace_file, sync_folder
from prelora_ds.run.checkpoints.checkpoint_folder import (
    STATE,
    CheckpointManifest,
    FileRecord,
    base_name,
    commit,
    retain,
    step_folder,
)
from prelora_ds.run.checkpoints.part import part_name, write_part
from prelora_ds.run.checkpoints.resume import Checkpoint
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import sync_logs
from prelora_ds.run.run_state import RunState

Files = dict[str, FileRecord]


@dataclass
class _Pending:
    """A checkpoint whose files are being written; ``state`` is the copy they are written from."""

    partial: Path
    manifest: CheckpointManifest
    state: EngineState
    files: Future[Files]
    begun: float


class Saver:
    """The checkpoints of one run; all methods are collective.

    base: the folder that holds what is frozen now, None while nothing is or it could not be written.
    slowest_s: seconds of the slowest checkpoint so far, from copy to name.
    last_step: of the newest checkpoint that this saver has committed.
    """

    def __init__(self, folder: RunFolder, config: Config, timeline: Timeline, say: Callable[[str], None],
                 data: Mapping[str, str] | None = None, classes: Sequence[str] = ()) -> None:
        self._data = dict(data or {})  # what `claim_output` tells data sets apart by
        self._classes = list(classes)
        self._folder, self.root = folder, folder.checkpoints
        self.base, self.slowest_s, self.last_step = None, 0.0, None
        self._config, self._timeline, self.say = config, timeline, say
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._removal: Future[None] | None = None
        self._spare: EngineState | None = None  # the host memory of the last copy

    base: str | None
    last_step: int | None

    def continue_from(self, found: Checkpoint) -> None:
        """Continue after the checkpoint ``found``, whose frozen weights are written already."""
        self.base, self.last_step = found.manifest.base, found.run.step

    @property
    def writing(self) -> bool:
        """Whether this rank still writes."""
        return self._pending is not None and not self._pending.files.done()

    def after_step(self, engine: Engine, state: RunState, stopping: int, writing: int, *, due: bool,
                   why: str | None) -> None:
        """Commit what all ranks have written, and begin what is due.

        stopping, writing: how many ranks were asked to stop (this one for the reason ``why``), and still write. Raises
        Stopped after the checkpoint of a run that was asked to, NotSavedError when that could not be written.
        """
        if not writing:
            self.finish_pending()
        if not (due or stopping):
            return
        sound = self.save(engine, state, wait=bool(stopping))
        if not stopping:
            return
        why = why or "another rank was asked to"
        if not sound:
            raise NotSavedError(f"asked to stop ({why}) after step {state.step}, and its checkpoint could not be "
                                "written\n  remedy: make room in run.output_dir; the same command goes on from what is "
                                "there")
        raise Stopped(f"stopped after step {state.step} ({why}); the same command goes on from its checkpoint")

    def save(self, engine: Engine, state: RunState, *, wait: bool = False) -> bool:
        """Begin a checkpoint, and with ``wait``, or without `checkpoint.async`, see it to its end.

        One is written at a time: the one before is waited for. False when one was waited for and could not be written.
        """
        sound, begun = self.finish_pending(), time.perf_counter()
        copied = copy_state(engine.ds, frozen=self.base is None, parked=engine.parked, reuse=self._spare)
        partial = self.root / f".{step_folder(self.root, state.step).name}.partial"
        document = None
        if self._rank == 0:
            document = json.dumps({
                "run": to_json(state), "adam_steps": copied.adam_steps,
                "counters": to_json(engine.counters()),
                "num_labels": engine.num_labels, "data": self._data, "config": self._config.model_dump(mode="json"),
                **({"classes": self._classes} if self._classes else {})})
        manifest = CheckpointManifest(self._world, engine.config.zero.stage, engine.plan.phase, {}, state.step,
                                      self.base, state.acc1)
        files = self._executor.submit(self._write_files, partial, copied, capture_rng(), document)
        self._pending = _Pending(partial, manifest, copied, files, begun)
        if self._config.checkpoint.deepspeed_format:
            partial.mkdir(parents=True, exist_ok=True)
            engine.ds.save_checkpoint(str(partial), tag="deepspeed", save_latest=False)
        return self.finish_pending() if wait or not self._config.checkpoint.async_ else sound

    def finish_pending(self) -> bool:
        """Wait for the checkpoint that is being written, if any, and commit it if all ranks have written their part."""
        if self._pending is None:
            return True
        pending, self._pending = self._pending, None
        problem = self.commit_if_all_wrote(pending.partial, pending.files.result,
                                           lambda files: self._commit(pending, files))
        self._spare = pending.state
        self.slowest_s = max(self.slowest_s, time.perf_counter() - pending.begun)
        step = pending.manifest.step
        if problem is None:
            self.last_step = step
        else:
            kept = "none was written before" if self.last_step is None else f"that of step {self.last_step} is kept"
            self.say(f"warning: the checkpoint of step {step} could not be written; {kept}: {problem}")
        return problem is None

    def keep_frozen(self, state: EngineState, plan: Plan) -> None:
        """Write what will not train under ``plan``, once for all its checkpoints (for `transition`).

        When it cannot be written, each checkpoint holds it itself.
        """
        if self._removal is not None:
            self._removal.result()  # it would not know the new base
        self.base, partial = None, self.root / ".base.partial"
        mine = EngineState({name: Slice(s.start, s.value) for name, s in state.slices.items()
                            if name not in plan.trainable})  # its moments are history

        def write() -> Files:
            partial.mkdir(parents=True, exist_ok=True)
            path = partial / part_name(self._rank, self._world)
            write_part(mine, path)
            return {path.name: FileRecord.of(path)}

        names: list[Any] = [None] * self._world
        dist.all_gather_object(names, len(mine.slices))
        if not any(names):
            return
        base: list[str] = []
        problem = self.commit_if_all_wrote(partial, write,
                                           lambda files: base.append(self._commit_base(partial, files, plan)))
        if problem is not None:
            self.say(f"warning: the frozen weights could not be written; each checkpoint will hold them: {problem}")
            return
        found: list[Any] = [base[0] if base else None]
        dist.broadcast_object_list(found, src=0)
        self.base = found[0]

    def close(self) -> None:
        """End the thread, without waiting for what it writes."""
        self._executor.shutdown(wait=False)

    def _write_files(self, partial: Path, state: EngineState, rng: str, document: str | None) -> Files:
        partial.mkdir(parents=True, exist_ok=True)
        path = partial / part_name(self._rank, self._world)
        write_part(state, path, {"rng": rng})
        written = [path]
        if document is not None:
            replace_file(partial / STATE, document)
            written.append(partial / STATE)
        return {p.name: FileRecord.of(p) for p in written}

    def commit_if_all_wrote(self, partial: Path, files: Callable[[], Files],
                            act: Callable[[Files], object]) -> str | None:
        """The vote: ``act`` on rank 0 with the files of all ranks if all could write theirs. None, or what went wrong
        on some rank, the same on all; then nothing of it is left."""
        mine: tuple[Files, str | None]
        try:
            mine = files(), None
        except OSError as exc:
            mine = {}, f"rank {self._rank}: {exc}"
        except Exception as exc:  # of the thread that writes; raised here, it would leave the other ranks in the vote
            mine = {}, f"rank {self._rank}: {type(exc).__name__}: {exc}"
        votes: list[Any] = [None] * self._world
        dist.all_gather_object(votes, mine)
        problem = next((error for _, error in votes if error is not None), None)
        verdict = [problem]
        if self._rank == 0:
            try:
                if problem is None:
                    act({name: record for found, _ in votes for name, record in found.items()})
            except OSError as exc:
                verdict = [f"rank 0: {exc}"]
            if verdict != [None]:
                shutil.rmtree(partial, ignore_errors=True)
        dist.broadcast_object_list(verdict, src=0)
        return verdict[0]

    def _commit(self, pending: _Pending, files: Files) -> None:
        manifest = replace(pending.manifest, files=files)
        assert manifest.step is not None
        final = step_folder(self.root, manifest.step)
        sync_logs(self._folder)
        commit(pending.partial, final, manifest)
        try:
            sync_folder(self.root)
            self._folder.saved.touch()
            replace_file(self._folder.latest, final.name + "\n")
        except OSError as exc:
            self.say(f"warning: {final.name} is whole, and its name could not be written into "
                     f"{self._folder.latest.name}: {exc}")
        # Gigabytes take seconds to remove: not while the ranks wait.
        self._removal = self._executor.submit(self._retain, self.base)

    def _retain(self, in_use: str | None) -> None:
        c = self._config.checkpoint
        ticks = frozenset() if c.keep_every is None else self._timeline.ticks(c.keep_every)
        try:
            retain(self.root, last=c.keep_last, best=c.keep_best, ticks=ticks, in_use=in_use)
        except OSError as exc:  # it costs no checkpoint: the new one has its name
            self.say(f"warning: older checkpoints could not be removed: {exc}")

    def _commit_base(self, partial: Path, files: Files, plan: Plan) -> str:
        final = self.root / base_name(files)
        manifest = CheckpointManifest(self._world, 0, plan.phase, files)
        if final.exists():  # of this run before it was cut off; the same content, and each file is replaced at once
            for name in files:
                (partial / name).replace(final / name)
            manifest.write(final)
            shutil.rmtree(partial)
        else:
            commit(partial, final, manifest)
            sync_folder(self.root)
        return final.name
