"""What is done about a step that is not as it should be: stop, leave its update out, or go back to a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist

from prelora_ds.config.training import DivergenceConfig
from prelora_ds.core.divergence import DivergenceWatch
from prelora_ds.data.batch import MicroBatch
from prelora_ds.data.corrupt import CorruptBudget
from prelora_ds.engine.build import Engine, StepStats
from prelora_ds.errors import TrainingDivergedError
from prelora_ds.run.checkpoints.resume import Checkpoint, load_newest, resumable_checkpoints
from prelora_ds.run.checkpoints.saver import Saver
from prelora_ds.run.context import Run
from prelora_ds.run.records import Records
from prelora_ds.run.run_state import RunState


def check_samples(run: Run, records: Records, engine: Engine, state: RunState, step: int, stats: StepStats,
                  micro_batches: Sequence[MicroBatch]) -> None:
    """Count the step's unreadable samples; raise CorruptBudgetError where its epoch has more than are allowed.

    All ranks raise at the same step, because they hold the same counts. Collective where it raises.
    """
    budget = CorruptBudget(run.config.data.corrupt_budget, run.timeline.samples)
    state.corrupt = budget.after(state.corrupt, run.timeline.epochs_done(step - 1), stats.corrupt)
    if not budget.exceeded(state.corrupt):
        return
    records.last_step(engine, step, stats, **{"data/corrupt": stats.corrupt})
    own = next((fault for batch in micro_batches for fault in batch.faults), "")
    faults = [""] * dist.get_world_size()
    dist.all_gather_object(faults, own)
    raise budget.error(state.corrupt, next(filter(None, faults), ""))


def recover(run: Run, records: Records, saver: Saver, engine: Engine, state: RunState, step: int,
            stats: StepStats) -> Checkpoint | None:
    """The checkpoint to go back to after a step that diverged, as `train.divergence` says.

    None where nothing is wrong, or where the update has just been left out. Raises TrainingDivergedError. Collective
    where the step diverged.
    """
    config = run.config.train.divergence
    problem = problem_of(state.watch, step, stats, config)
    if problem is None:
        return None
    if config.action == "rollback" and state.watch.rollbacks < config.tries:
        saver.finish_pending()
        found = load_newest(resumable_checkpoints(run.folder, "auto"), run.folder, run.layout, records.say)
        if found is not None:
            found.run.watch = found.run.watch.rolled_back(step, state.watch)
            records.say(f"step {step}: {problem}; back to step {found.run.step}, to leave this update out")
            return found
    if config.action == "skip" and stats.skipped and state.watch.in_a_row < config.tries:
        records.say(f"step {step}: {problem}; the update is left out")
        return None

    records.last_step(engine, step, stats)
    remedy = "a lower optimizer.lr, a longer optimizer.warmup, a smaller optimizer.clip_grad_norm"
    if config.action == "stop":
        remedy += ", or train.divergence.action=skip or rollback"
    raise TrainingDivergedError(f"step {step}, phase {engine.plan.phase}: {problem}"
                                f"{_why_no_way_back(state, config)}\n  remedy: {remedy}")


def problem_of(watch: DivergenceWatch, step: int, stats: StepStats, config: DivergenceConfig) -> str | None:
    """What is wrong with a step, in words; None if nothing is, or if its update was left out on purpose."""
    if step in watch.avoided or not (stats.skipped or not math.isfinite(stats.grad_norm)):
        return None
    return watch.problem(stats.loss, config) or f"the gradient norm is {stats.grad_norm}"


def _why_no_way_back(state: RunState, config: DivergenceConfig) -> str:
    """Why the action that the user chose was not taken."""
    chosen = f"; train.divergence.action = {config.action}"
    if config.action == "rollback" and state.watch.rollbacks < config.tries:
        return f"{chosen}, and there is not yet a checkpoint to go back to"
    if config.action == "rollback":
        return f"{chosen}, and all {config.tries} tries (train.divergence.tries) are used up"
    if config.action == "skip" and state.watch.in_a_row >= config.tries:
        return f"{chosen}, and {config.tries} updates in a row (train.divergence.tries) were skipped already"
    if config.action == "skip":
        return f"{chosen}, and this update had been taken before the problem was seen"
    return ""
