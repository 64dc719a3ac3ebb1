"""Handle unreadable samples and diverged steps: stop, skip the update, or roll back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist

from prelora_ds.config.training import DivergenceConfig
from prelora_ds.core.divergence import DivergenceWatch
from prelora_ds.data.batch import MicroBatch
from prelora_ds.data.corrupt import CorruptBudget
from prelora_ds.engine.engine import Engine, StepStats
from prelora_ds.errors import TrainingDivergedError
from prelora_ds.run.checkpoints.resume import Checkpoint, load_newest, resumable_checkpoints
from prelora_ds.run.checkpoints.saver import Saver
from prelora_ds.run.context import Run
from prelora_ds.run.records import Records
from prelora_ds.run.run_state import RunState


def check_samples(
    run: Run,
    records: Records,
    engine: Engine,
    state: RunState,
    step: int,
    stats: StepStats,
    micro_batches: Sequence[MicroBatch],
) -> None:
    """Count the step's unreadable samples; raise CorruptBudgetError if there are too many.

    All ranks raise at the same step, because the counts are global. Collective if it raises.
    """
    budget = CorruptBudget(run.config.data.corrupt_budget, run.timeline.samples)
    state.corrupt = budget.after(state.corrupt, run.timeline.epochs_done(step - 1), stats.corrupt)
    if not budget.exceeded(state.corrupt):
        return
    records.last_step(engine, step, stats, **{"data/corrupt": stats.corrupt})
    fault_here = next((fault for batch in micro_batches for fault in batch.faults), "")
    faults = [""] * dist.get_world_size()
    dist.all_gather_object(faults, fault_here)
    raise budget.error(state.corrupt, next(filter(None, faults), ""))


def recover(run: Run, records: Records, saver: Saver, engine: Engine, state: RunState, step: int,
            stats: StepStats) -> Checkpoint | None:
    """Handle a step that diverged, as `train.divergence` specifies.

    Returns the checkpoint to roll back to. Returns None if the step did not diverge or its update
    was skipped. Raises TrainingDivergedError. Collective if the step diverged.
    """
    config = run.config.train.divergence
    problem = divergence_problem(state.watch, step, stats, config)
    if problem is None:
        return None
    if config.action == "rollback" and state.watch.rollbacks < config.tries:
        saver.finish_pending()
        candidates = resumable_checkpoints(run.folder, "auto")
        checkpoint = load_newest(candidates, run.folder, run.layout, records.say)
        if checkpoint is not None:
            checkpoint.run.watch = checkpoint.run.watch.rolled_back(step, state.watch)
            records.say(f"step {step}: {problem}; rolling back to step {checkpoint.run.step}; this "
                        "update will be skipped")
            return checkpoint
    if config.action == "skip" and stats.skipped and state.watch.in_a_row < config.tries:
        records.say(f"step {step}: {problem}; update skipped")
        return None

    records.last_step(engine, step, stats)
    remedy = ("try a lower optimizer.lr, a longer optimizer.warmup or a smaller "
              "optimizer.clip_grad_norm")
    if config.action == "stop":
        remedy += ", or train.divergence.action=skip or rollback"
    raise TrainingDivergedError(f"step {step}, phase {engine.plan.phase}: {problem}"
                                f"{_why_action_was_not_taken(state, config)}\n  remedy: {remedy}")


def divergence_problem(watch: DivergenceWatch, step: int, stats: StepStats,
                       config: DivergenceConfig) -> str | None:
    """Describe what is wrong with a step.

    Returns None if nothing is wrong, or if the update of the step was skipped on purpose after a
    rollback.
    """
    if step in watch.avoided:
        return None
    if not stats.skipped and math.isfinite(stats.grad_norm):
        return None
    return watch.problem(stats.loss, config) or f"the gradient norm is {stats.grad_norm}"


def _why_action_was_not_taken(state: RunState, config: DivergenceConfig) -> str:
    """Explain why the action that the user chose was not taken."""
    chosen = f"; train.divergence.action = {config.action}"
    if config.action == "rollback" and state.watch.rollbacks < config.tries:
        return f"{chosen}, but there is no checkpoint to roll back to yet"
    if config.action == "rollback":
        return f"{chosen}, but all {config.tries} tries (train.divergence.tries) are used up"
    if config.action == "skip" and state.watch.in_a_row >= config.tries:
        return (f"{chosen}, but the limit of {config.tries} consecutive skipped updates "
                "(train.divergence.tries) is reached")
    if config.action == "skip":
        return f"{chosen}, but the update was already applied when the problem was detected"
    return ""
