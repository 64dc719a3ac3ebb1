"""What is done about a step that diverged: stop, leave its update out, or go back to a checkpoint."""

from __future__ import annotations

import math

from prelora_ds.config.tree import DivergenceConfig
from prelora_ds.core.divergence import DivergenceWatch
from prelora_ds.core.layout import Layout
from prelora_ds.engine.build import StepStats
from prelora_ds.errors import TrainingDivergedError
from prelora_ds.run.checkpoints.resume import Checkpoint, candidates, load_newest
from prelora_ds.run.checkpoints.saver import Saver
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.run_state import RunState


def problem_of(watch: DivergenceWatch, step: int, stats: StepStats, config: DivergenceConfig) -> str | None:
    """What is wrong with a step, in words; None if nothing is, or if its update was left out on purpose."""
    if step in watch.avoided or not (stats.skipped or not math.isfinite(stats.grad_norm)):
        return None
    return watch.problem(stats.loss, config) or f"the gradient norm is {stats.grad_norm}"


def way_back(saver: Saver, layout: Layout, folder: RunFolder, state: RunState, stats: StepStats, step: int,
             problem: str, config: DivergenceConfig) -> Checkpoint | None:
    """The checkpoint to go back to, as `train.divergence` says; None where the update has just been left out.

    Raises TrainingDivergedError. Collective.
    """
    if config.action == "rollback" and state.watch.rollbacks < config.tries:
        saver.settle()
        found = load_newest(candidates(folder, "auto"), layout, saver.say)
        if found is not None:
            found.run.watch = found.run.watch.rolled_back(step, state.watch)
            saver.say(f"step {step}: {problem}; back to step {found.run.step}, to leave this update out")
            return found
    if config.action == "skip" and stats.skipped and state.watch.in_a_row < config.tries:
        saver.say(f"step {step}: {problem}; the update is left out")
        return None
    remedy = "a lower optimizer.lr, a longer optimizer.warmup, a smaller optimizer.clip_grad_norm"
    if config.action == "stop":
        remedy += ", or train.divergence.action=skip or rollback"
    raise TrainingDivergedError(f"step {step}, phase {state.phase.plan.phase}: {problem}"
                                f"{_why_no_way_back(state, config)}\n  remedy: {remedy}")


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
