"""Write checkpoints: a copy on the host, a thread that writes it, a vote, and the rename."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prelora_ds.config.tree import Config
from prelora_ds.core.codec import to_json
from prelora_ds.core.plan import Plan
from prelora_ds.core.schedule import Timeline
from prelora_ds.engine.engine import Engine
from prelora_ds.engine.rng import capture_rng
from prelora_ds.engine.state import EngineState, Slice, copy_state
from prelora_ds.errors import NotSavedError, Stopped
from prelora_ds.files import replace_file, sync_folder
from prelora_ds.run.checkpoints.checkpoint_folder import (
    RUN_STATE,
    BrokenCheckpointError,
    CheckpointManifest,
    FileRecord,
    base_name,
    commit,
    load_base,
    retain,
    step_folder,
)
from prelora_ds.run.checkpoints.part import part_name, read_state, write_part
from prelora_ds.run.checkpoints.resume import Checkpoint
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import sync_logs
from prelora_ds.run.run_state import RunState

Files = dict[str, FileRecord]


@dataclass
class _Pending:
    """A checkpoint whose files are being written from the copy ``state``."""

    partial: Path
    manifest: CheckpointManifest
    state: EngineState
    files: Future[Files]
    started_at: float


class Saver:
    """The checkpoints of one run. All methods are collective.

    base: the folder of the frozen weights; None if nothing is frozen or it could not be written.
    slowest_s: seconds that the slowest checkpoint so far took, from the copy to the rename.
    last_step: the step of the newest checkpoint that this saver has committed or resumed from.
    """

    base: str | None
    last_step: int | None

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        timeline: Timeline,
        say: Callable[[str], None],
        data: Mapping[str, str] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.root = folder.checkpoints
        self.base = None
        self.last_step = None
        self.slowest_s = 0.0
        self.say = say
        self._folder = folder
        self._config = config
        self._timeline = timeline
        self._data = dict(data or {})  # Data set fingerprints, compared by `claim_output`.
        self._classes = list(classes)
        self._rank = dist.get_rank()
        self._world = dist.get_world_size()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._removal: Future[None] | None = None
        self._spare: EngineState | None = None  # The host memory of the last copy, to be reused.

    def continue_from(self, checkpoint: Checkpoint) -> None:
        """Continue after ``checkpoint``, whose frozen weights are already written."""
        self.base = checkpoint.manifest.base
        self.last_step = checkpoint.run.step

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing."""
        return self._pending is not None and not self._pending.files.done()

    def after_step(
        self,
        engine: Engine,
        state: RunState,
        stopping: int,
        writing: int,
        *,
        due: bool,
        why: str | None,
    ) -> None:
        """Commit the checkpoint that all ranks have written, and start the one that is due.

        stopping, writing: the number of ranks that were asked to stop, and that are still writing.
        why: this rank's reason to stop.

        Raises Stopped once the checkpoint of a run that was asked to stop is written, and
        NotSavedError if it could not be written.
        """
        if not writing:
            self.finish_pending()
        if not (due or stopping):
            return
        saved = self.save(engine, state, wait=bool(stopping))
        if not stopping:
            return
        why = why or "another rank was asked to stop"
        if not saved:
            raise NotSavedError(
                f"stop requested ({why}) after step {state.step}, but the checkpoint could not be "
                "written\n  remedy: free space in run.output_dir; the same command resumes from "
                "the previous checkpoint"
            )
        raise Stopped(f"stopped after step {state.step} ({why}); run the same command to resume")

    def save(self, engine: Engine, state: RunState, *, wait: bool = False,
             own: Mapping[str, Any] | None = None) -> bool:
        """Start to write a checkpoint; with ``wait``, or without `checkpoint.async`, finish it too.

        own: what the loop of a user saves with it (`Checkpoint.own`), as values of JSON.

        Only one checkpoint is written at a time: the previous one is finished first. Returns False
        if a checkpoint that this call waited for could not be written.
        """
        saved = self.finish_pending()
        started_at = time.perf_counter()
        copied = copy_state(
            engine.ds, frozen=self.base is None, parked=engine.parked, reuse=self._spare
        )
        partial = self.root / f".{step_folder(self.root, state.step).name}.partial"
        document = None
        if self._rank == 0:
            document = json.dumps(
                {
                    "run": to_json(state),
                    "adam_steps": copied.adam_steps,
                    "counters": to_json(engine.counters()),
                    "num_labels": engine.num_labels,
                    "data": self._data,
                    "config": self._config.model_dump(mode="json"),
                    **({"classes": self._classes} if self._classes else {}),
                    **({"own": dict(own)} if own else {}),
                }
            )
        manifest = CheckpointManifest(
            self._world,
            engine.config.zero.stage,
            engine.plan.phase,
            {},
            state.step,
            self.base,
            state.acc1,
        )
        files = self._executor.submit(self._write_files, partial, copied, capture_rng(), document)
        self._pending = _Pending(partial, manifest, copied, files, started_at)
        if self._config.checkpoint.deepspeed_format:
            partial.mkdir(parents=True, exist_ok=True)
            engine.ds.save_checkpoint(str(partial), tag="deepspeed", save_latest=False)
        if wait or not self._config.checkpoint.async_:
            return self.finish_pending()
        return saved

    def finish_pending(self) -> bool:
        """Wait for the checkpoint that is being written, if any.

        It is committed if all ranks wrote it. Returns False if it could not be written.
        """
        if self._pending is None:
            return True
        pending = self._pending
        self._pending = None
        problem = self.commit_if_all_wrote(
            pending.partial, pending.files.result, lambda files: self._commit(pending, files)
        )
        self._spare = pending.state
        self.slowest_s = max(self.slowest_s, time.perf_counter() - pending.started_at)
        step = pending.manifest.step
        if problem is None:
            self.last_step = step
            return True

        previous = "there is no earlier one"
        if self.last_step is not None:
            previous = f"keeping the one of step {self.last_step}"
        self.say(
            f"warning: the checkpoint of step {step} could not be written; {previous}: {problem}"
        )
        return False

    def save_frozen(self, state: EngineState, plan: Plan) -> None:
        """Write the parameters that ``plan`` freezes once, for all later checkpoints to reference.

        It is called before the first engine is built, and by `transition`. If they cannot be
        written, every checkpoint includes them.
        """
        if self._removal is not None:
            # A running removal does not know the new base and might delete it.
            self._removal.result()
        if self.base is not None:
            self._restore_fp32(state, self.base)
            self.base = None
        partial = self.root / ".base.partial"
        frozen = EngineState(
            {
                name: Slice(s.start, s.value)  # without the moments, which are no longer needed
                for name, s in state.slices.items()
                if name not in plan.trainable
            }
        )

        def write() -> Files:
            partial.mkdir(parents=True, exist_ok=True)
            path = partial / part_name(self._rank, self._world)
            write_part(frozen, path)
            return {path.name: FileRecord.of(path)}

        slices_per_rank: list[Any] = [None] * self._world
        dist.all_gather_object(slices_per_rank, len(frozen.slices))
        if not any(slices_per_rank):
            return

        name: list[Any] = [None]

        def commit_base(files: Files) -> None:
            name[0] = self._commit_base(partial, files, plan)

        problem = self.commit_if_all_wrote(partial, write, commit_base)
        if problem is not None:
            self.say(
                "warning: the frozen weights could not be written; every checkpoint will include "
                f"them: {problem}"
            )
            return
        dist.broadcast_object_list(name, src=0)
        self.base = name[0]

    def _restore_fp32(self, state: EngineState, base: str) -> None:
        """Replace BF16 copies in ``state`` by their fp32 values in ``base``.

        An engine has only BF16 copies of most of what it has frozen, and a fork may train it again.
        """
        slices_per_rank: list[Any] = [None] * self._world
        mine = {
            name: s.value.numel()
            for name, s in state.slices.items()
            if s.value.dtype != torch.float32
        }
        dist.all_gather_object(slices_per_rank, mine)
        elements: Counter[str] = Counter()
        for lengths in slices_per_rank:
            elements.update(lengths)
        if not elements:
            return

        frozen, problem = EngineState({}), None
        try:
            world = load_base(self.root, base).world_size
            frozen, _ = read_state(
                [self.root / base], [world], elements, self._rank, self._world
            )
        except (BrokenCheckpointError, OSError) as exc:
            problem = f"rank {self._rank}: {exc}"
        frozen.slices = {name: s for name, s in frozen.slices.items() if name in elements}
        votes: list[Any] = [None] * self._world
        dist.all_gather_object(votes, (list(frozen.slices), problem))
        problem = next((error for _, error in votes if error is not None), None)
        if problem is not None:
            self.say(
                "warning: the weights that are already frozen could not be read, and only their "
                f"BF16 copies are kept: {problem}"
            )
            return

        # The ranks may have shared these parameters otherwise when the base was written.
        for names, _ in votes:
            for name in names:
                state.slices.pop(name, None)
        state.slices |= frozen.slices

    def close(self) -> None:
        """End the thread without waiting for what it is writing."""
        self._executor.shutdown(wait=False)

    def _write_files(
        self, partial: Path, state: EngineState, rng: str, document: str | None
    ) -> Files:
        partial.mkdir(parents=True, exist_ok=True)
        path = partial / part_name(self._rank, self._world)
        write_part(state, path, {"rng": rng})
        written = [path]
        if document is not None:
            replace_file(partial / RUN_STATE, document)
            written.append(partial / RUN_STATE)
        return {p.name: FileRecord.of(p) for p in written}

    def commit_if_all_wrote(
        self, partial: Path, files: Callable[[], Files], commit_files: Callable[[Files], object]
    ) -> str | None:
        """Let all ranks vote; if every rank wrote its files, commit the files of all ranks.

        files: returns the files of this rank, or raises if they could not be written.
        commit_files: called on rank 0 with the files of all ranks.

        Returns None, or the same error text on every rank; the folder ``partial`` is then removed.
        """
        vote: tuple[Files, str | None]
        try:
            vote = files(), None
        except OSError as exc:
            vote = {}, f"rank {self._rank}: {exc}"
        except Exception as exc:
            # Any error of the writing thread: raised here, it would leave the other ranks in the
            # vote.
            vote = {}, f"rank {self._rank}: {type(exc).__name__}: {exc}"
        votes: list[Any] = [None] * self._world
        dist.all_gather_object(votes, vote)
        problem = next((error for _, error in votes if error is not None), None)
        verdict = [problem]
        if self._rank == 0:
            try:
                if problem is None:
                    all_files = {
                        name: record
                        for files_of_rank, _ in votes
                        for name, record in files_of_rank.items()
                    }
                    commit_files(all_files)
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
            self.say(
                f'warning: {final.name} was saved, but "{self._folder.latest.name}" could not be '
                f"updated: {exc}"
            )
        # Removing gigabytes takes seconds: do it in the thread, so that the ranks do not wait.
        self._removal = self._executor.submit(self._retain, self.base)

    def _retain(self, in_use: str | None) -> None:
        settings = self._config.checkpoint
        every = settings.keep_every
        ticks = frozenset() if every is None else self._timeline.ticks(every)
        try:
            retain(
                self.root,
                last=settings.keep_last,
                best=settings.keep_best,
                ticks=ticks,
                in_use=in_use,
            )
        except OSError as exc:
            # Not fatal: the new checkpoint is already committed.
            self.say(f"warning: older checkpoints could not be removed: {exc}")

    def _commit_base(self, partial: Path, files: Files, plan: Plan) -> str:
        """Give the base its name, and return that name."""
        final = self.root / base_name(files)
        manifest = CheckpointManifest(self._world, 0, plan.phase, files)
        if final.exists():
            # Left by this run before a crash: the content is identical, and each file is replaced
            # atomically.
            for name in files:
                (partial / name).replace(final / name)
            manifest.write(final)
            shutil.rmtree(partial)
        else:
            commit(partial, final, manifest)
            sync_folder(self.root)
        return final.name
