"""Decide the next plan from an observation, and make the engine follow a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from prelora_ds.core.codec import from_json, to_json
from prelora_ds.core.controller import PhaseState
from prelora_ds.core.phases import thawed_later
from prelora_ds.data.loader import Loader
from prelora_ds.engine.build import Engine
from prelora_ds.engine.runtime import on_rank_0
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
                phase: PhaseState) -> Engine:
    """Return the engine for the plan of ``phase``. Collective.

    It is ``engine`` itself if the plan has the same structure, otherwise a rebuilt one.
    """
    plan = phase.plan
    if plan == engine.plan:
        return engine
    if plan.structure() == engine.plan.structure():
        engine.set_active(plan.training())
        engine.plan = plan
        return engine

    later = thawed_later(run.config.specs(), run.layout, phase.index)
    engine, switch = transition(engine, plan, keep_frozen=saver.save_frozen, parked=later)
    loader.rebatch(engine.config.train.micro_batch_size)
    records.plan(engine, phase, switch)
    return engine
