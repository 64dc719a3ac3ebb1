"""Build the engine and the state at the first step of a job, from scratch or from a checkpoint."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from prelora_ds.config.tree import Config
from prelora_ds.core.controller import PhaseController, PhaseState
from prelora_ds.core.divergence import DivergenceWatch
from prelora_ds.core.phases import needed_in_fp32
from prelora_ds.data.setup import fingerprints
from prelora_ds.engine.build import build_engine
from prelora_ds.engine.engine import Engine
from prelora_ds.engine.measure import check_ranks_agree
from prelora_ds.engine.rng import seed_rng
from prelora_ds.engine.spectra import SpectrumMeter, first_values
from prelora_ds.engine.state import EngineState, initial_state
from prelora_ds.engine.transition import KeepFrozen, release_checked
from prelora_ds.errors import ConfigError
from prelora_ds.model.families import MakeModule
from prelora_ds.model.losses import init_sigmoid_head
from prelora_ds.model.vit import build_model
from prelora_ds.run.checkpoints.resume import Checkpoint, rewind_output
from prelora_ds.run.checkpoints.saver import Saver
from prelora_ds.run.context import Run
from prelora_ds.run.forks import windows_differ
from prelora_ds.run.records import Records
from prelora_ds.run.run_state import RunState


def begin(run: Run, records: Records, saver: Saver,
          checkpoint: Checkpoint | None) -> tuple[Engine, RunState]:
    """Build the first engine and run state, or restore them from ``checkpoint``. Collective.

    Raises ConfigError on all ranks if a later phase trains parameters of which ``checkpoint`` has
    only BF16 copies.
    """
    if checkpoint is None:
        engine, state = first_engine(run.config, run.controller, _first_weights(run), saver.save_frozen,
                                     num_labels=run.labels)
    else:
        state = checkpoint.run
        if not checkpoint.belongs_to(run.folder):
            state.phase = _as_fork(run, records, state.phase, checkpoint)
        engine = restored_engine(run.config, run.controller, checkpoint, num_labels=run.labels)
        saver.continue_from(checkpoint)
        records.resumed(engine, checkpoint)
    records.attach_monitor(engine)

    if checkpoint is None or not checkpoint.belongs_to(run.folder):
        records.plan(engine, state.phase, state.phase.plan.since_step, switch=None)
    if checkpoint is not None and not checkpoint.belongs_to(run.folder):
        records.forked(state.phase, state.step)
    return engine, state


def first_engine(config: Config, controller: PhaseController, weights: EngineState, keep_frozen: KeepFrozen | None, *,
                 num_labels: int, make_module: MakeModule | None = None) -> tuple[Engine, RunState]:
    """Build the engine of the first step from ``weights``, which are consumed, and the state before it. Collective.

    keep_frozen: saves what the first plan freezes, as in `transition`.
    make_module: see `build_engine`.
    """
    state = RunState(0, controller.initial(), DivergenceWatch())
    plan = state.phase.plan
    if keep_frozen is not None:
        keep_frozen(weights, plan)
    engine = build_engine(config, plan, controller.layout, num_labels, weights,
                          parked=_needed_in_fp32(controller, state), make_module=make_module)
    seed_rng(config.run.seed, dist.get_rank())  # Dropout differs between ranks.
    check_ranks_agree(engine)
    return engine, state


def restored_engine(config: Config, controller: PhaseController, checkpoint: Checkpoint, *, num_labels: int,
                    make_module: MakeModule | None = None) -> Engine:
    """Build the engine of ``checkpoint``, and restore the random generators. Collective.

    make_module: see `build_engine`.

    Raises ConfigError on all ranks as `begin` does.
    """
    plan = checkpoint.run.phase.plan
    thawed = _needed_in_fp32(controller, checkpoint.run)
    check_fp32(checkpoint, thawed - plan.trainable)
    engine = build_engine(config, plan, controller.layout, num_labels, checkpoint.engine, checkpoint.counters,
                          parked=thawed, make_module=make_module)
    checkpoint.restore_rng(config.run.seed)
    check_ranks_agree(engine)
    return engine


def roll_back(run: Run, records: Records, saver: Saver, engine: Engine,
              checkpoint: Checkpoint) -> tuple[Engine, RunState]:
    """Release ``engine``, and restore engine and state from ``checkpoint``. Collective."""
    release_checked(engine)
    records.rewind(checkpoint.run.step, partial(rewind_output, run.folder, checkpoint))
    return begin(run, records, saver, checkpoint)


def _as_fork(run: Run, records: Records, phase: PhaseState, source: Checkpoint) -> PhaseState:
    """``phase`` of a fork, without the windows of its source if they cannot be compared."""
    data = fingerprints(run.train_data, run.val_data)
    differs = windows_differ(
        source.config, source.data, run.config, data, phase.index, source.folder
    )
    if differs is None or not phase.windows:
        return phase
    records.say(
        f"the windows of {source.folder} are not used, because {differs} differs: this "
        "run starts new windows"
    )
    return phase.without_windows()


def check_fp32(checkpoint: Checkpoint, names: frozenset[str]) -> None:
    """Raise ConfigError on all ranks if ``checkpoint`` has only a BF16 copy of one of ``names``."""
    slices = checkpoint.engine.slices
    rounded = [
        name for name in names if name in slices and slices[name].value.dtype != torch.float32
    ]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, rounded)
    found = sorted({name for names_of_rank in ranks for name in names_of_rank})
    if found:
        raise ConfigError(
            "--resume",
            str(checkpoint.folder),
            f"contains only BF16 copies of {len(found)} frozen parameters that a phase trains or "
            f"quantises, such as {found[0]}",
            "begin from a checkpoint of a phase that trains them, or leave them frozen in BF16",
        )


def _needed_in_fp32(controller: PhaseController, state: RunState) -> frozenset[str]:
    return needed_in_fp32(controller.phases, controller.layout, state.phase.index)


def spectrum_meter(run: Run) -> SpectrumMeter | None:
    """Return what measures the spectra of ``run``; None if it does not observe them.

    Call it before `begin`, because it draws the first weights again, with torch's generator.
    """
    return SpectrumMeter(first_values(_first_weights(run), run.layout)) if run.config.observe.spectra else None


def _first_weights(run: Run) -> EngineState:
    """Return this rank's part of the initial weights, which depend on the seed only."""
    torch.manual_seed(run.config.run.seed)
    module = build_model(run.config.model, run.labels)
    if run.config.train.loss == "sigmoid":
        init_sigmoid_head(module, run.labels)
    return initial_state(module, dist.get_rank(), dist.get_world_size())
