"""Decide the next plan from an observation, and make the engine follow a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from prelora_ds.core.codec import from_json, to_json
from prelora_ds.core.controller import PhaseState
from prelora_ds.core.phases import needed_in_fp32
from prelora_ds.data.loader import Loader
from prelora_ds.engine.build import Engine
from prelora_ds.engine.merge import fold_adapters, merge_adapters
from prelora_ds.engine.resize import resize_adapters
from prelora_ds.engine.runtime import on_rank_0
from prelora_ds.engine.state import EngineState, frozen_slices
from prelora_ds.engine.transition import transition
from prelora_ds.run.checkpoints.saver import Saver
from prelora_ds.run.context import Run
from prelora_ds.run.records import Records
from prelora_ds.run.run_state import RunState


def decide(run: Run, records: Records, state: RunState, step: int,
           norms: Mapping[str, Mapping[int, float]]) -> PhaseState:
    """Return the phase state after an observation, which ends the current window of losses.

    Collective. Rank 0 decides and broadcasts. A decision after the last step is logged but not
    followed.
    """
    observation = state.window.observation(step, norms)
    before = state.phase
    records.observation(observation)
    state.window.reset()

    decision = on_rank_0(lambda: to_json(run.controller.next(before, observation)))
    after = from_json(PhaseState, decision)
    records.decision(before, after, step)
    if step == run.timeline.total_steps:
        return replace(
            after, plan=before.plan, index=before.index, first_window=before.first_window
        )
    return after


def follow_plan(run: Run, records: Records, saver: Saver, engine: Engine, loader: Loader,
                phase: PhaseState, step: int) -> Engine:
    """Return the engine for the plan of ``phase`` after ``step``. Collective.

    It is ``engine`` itself if the plan has the same structure, otherwise a rebuilt one.
    """
    plan = phase.plan
    if plan == engine.plan:
        return engine
    if plan.structure() == engine.plan.structure():
        if plan.cycle != engine.plan.cycle:
            _merge(run, records, saver, engine, phase, step)
        if plan.training() != engine.plan.training():
            records.active(step, phase)
        engine.set_active(plan.training())
        engine.plan = plan
        return engine

    later = needed_in_fp32(run.config.specs(), run.layout, phase.index)
    edit = fold_adapters if plan.cycle != engine.plan.cycle else resize_adapters
    engine, switch = transition(engine, plan, edit=partial(edit, layout=run.layout), keep_frozen=saver.save_frozen,
                                parked=later)
    loader.rebatch(engine.config.train.micro_batch_size)
    records.plan(engine, phase, step, switch)
    return engine


def _merge(run: Run, records: Records, saver: Saver, engine: Engine, phase: PhaseState, step: int) -> None:
    """Merge the adapters, and write the frozen weights that came of it for later checkpoints. Collective."""
    merge = run.config.specs()[phase.index].merge
    assert merge is not None, "only such a phase has cycles"
    report = merge_adapters(engine, phase.plan, merge.reset)
    records.merge(step, phase.plan, merge.reset, report)
    rest = frozen_slices(engine.ds, without=engine.parked.keys())
    saver.save_frozen(EngineState(rest | dict(engine.parked)), phase.plan)
