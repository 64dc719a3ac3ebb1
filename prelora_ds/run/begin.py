"""The engine and the state at the first step of a job: from scratch, or as a checkpoint has them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from prelora_ds.core.divergence import DivergenceWatch
from prelora_ds.core.phases import thawed_later
from prelora_ds.engine.build import Engine, build_engine
from prelora_ds.engine.measure import check_ranks_agree
from prelora_ds.engine.rng import seed_rng
from prelora_ds.engine.state import EngineState, initial_state
from prelora_ds.engine.transition import release_checked
from prelora_ds.model.losses import begin_sigmoid_head
from prelora_ds.model.vit import build_model
from prelora_ds.run.checkpoints.resume import Checkpoint, rewind_output
from prelora_ds.run.checkpoints.saver import Saver
from prelora_ds.run.context import Run
from prelora_ds.run.records import Records
from prelora_ds.run.run_state import RunState


def begin(run: Run, records: Records, saver: Saver, found: Checkpoint | None) -> tuple[Engine, RunState]:
    """Engine and state at the first step of all, or as ``found`` has them. Collective."""
    if found is None:
        state = RunState(0, run.controller.initial(), DivergenceWatch())
        engine = build_engine(run.config, state.phase.plan, run.layout, run.labels, _first_weights(run))
        seed_rng(run.config.run.seed, dist.get_rank())  # dropout differs from rank to rank
    else:
        state = found.run
        parked = thawed_later(run.config.specs(), run.layout, state.phase.index)
        engine = build_engine(run.config, state.phase.plan, run.layout, run.labels, found.engine, found.counters,
                              parked=parked)
        found.restore_rng(run.config.run.seed)
        saver.continue_from(found)
        records.resumed(engine, found)
    check_ranks_agree(engine)
    records.lend_monitor(engine)

    if found is None or not found.belongs_to(run.folder):
        records.plan(engine, state.phase, switch=None)
    return engine, state


def roll_back(run: Run, records: Records, saver: Saver, engine: Engine,
              found: Checkpoint) -> tuple[Engine, RunState]:
    """Engine and state as the checkpoint ``found`` of this run has them; ``engine`` is dead afterwards. Collective."""
    release_checked(engine)
    records.close_logs()
    rewind_output(run.folder, found)
    records.open_logs(found.run.step)
    return begin(run, records, saver, found)


def _first_weights(run: Run) -> EngineState:
    torch.manual_seed(run.config.run.seed)
    module = build_model(run.config.model, run.labels)
    if run.config.train.loss == "sigmoid":
        begin_sigmoid_head(module, run.labels)
    return initial_state(module, dist.get_rank(), dist.get_world_size())
