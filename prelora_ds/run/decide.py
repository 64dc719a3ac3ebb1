"""Decide the next plan from an observation, and make the engine follow a plan.

`decided`, `to_follow` and `engine_for` serve every loop. `decide` and `follow_plan` are the same with the records of a
run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from prelora_ds.core.codec import from_json, to_json
from prelora_ds.core.controller import PhaseController, PhaseState
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import needed_in_fp32
from prelora_ds.core.plan import Plan
from prelora_ds.core.quantised import BF16, PROBES
from prelora_ds.core.spectra import Spectra
from prelora_ds.core.switch_tests.prelora import Observation
from prelora_ds.engine.engine import Engine
from prelora_ds.engine.feed import DeviceFeed
from prelora_ds.engine.from_update import start_from_updates
from prelora_ds.engine.measure import logits_of, relative_change
from prelora_ds.engine.merge import MergeReport, fold_adapters, merge_adapters
from prelora_ds.engine.resize import resize_adapters
from prelora_ds.engine.runtime import device, on_rank_0
from prelora_ds.engine.state import EngineState, frozen_slices, reset_moments
from prelora_ds.engine.transition import KeepFrozen, Switch, transition
from prelora_ds.run.checkpoints.saver import Saver
from prelora_ds.run.context import Run
from prelora_ds.run.records import Records
from prelora_ds.run.run_state import RunState


@dataclass(frozen=True)
class Change:
    """How an engine was made to follow a plan.

    switch: the cost of the rebuild; None if the engine was not rebuilt.
    merge: what a merge of the adapters on the live engine did, if there was one.
    chosen: whether other parameters train on the live engine.
    """

    switch: Switch | None = None
    merge: MergeReport | None = None
    chosen: bool = False


def decided(controller: PhaseController, state: RunState, step: int, norms: Mapping[str, Mapping[int, float]],
            spectra: Spectra) -> tuple[Observation, PhaseState]:
    """Return the observation that ends the current window of losses, and the phase state after it.

    spectra: empty if the run does not observe them.

    Collective. Rank 0 decides and broadcasts.
    """
    observation = state.window.observation(step, norms, spectra)
    state.window.reset()
    decision = on_rank_0(lambda: to_json(controller.next(state.phase, observation)))
    return observation, from_json(PhaseState, decision)


def to_follow(controller: PhaseController, before: PhaseState, after: PhaseState, step: int) -> PhaseState:
    """Return ``after``, but with the plan of ``before`` if ``step`` is the last one."""
    if step == controller.timeline.total_steps:
        return replace(after, plan=before.plan, index=before.index, first_window=before.first_window)
    return after


def engine_for(engine: Engine, phase: PhaseState, controller: PhaseController,
               keep_frozen: KeepFrozen | None) -> tuple[Engine, Change]:
    """Return the engine for the plan of ``phase``, and how it came to follow the plan. Collective.

    It is ``engine`` itself if the plan has the same structure, otherwise a rebuilt one.

    keep_frozen: saves frozen parameters, as in `transition`.
    """
    plan = phase.plan
    if plan == engine.plan:
        return engine, Change()
    if plan.structure() == engine.plan.structure():
        merge = None
        if plan.cycle != engine.plan.cycle:
            merge = _merge(engine, phase, controller, keep_frozen)
        chosen = plan.training() != engine.plan.training()
        engine.set_active(plan.training())
        engine.plan = plan
        return engine, Change(merge=merge, chosen=chosen)

    later = needed_in_fp32(controller.phases, controller.layout, phase.index)
    resets = controller.phases[phase.index].resets_moments and plan.phase != engine.plan.phase

    def edit(state: EngineState, old: Plan, new: Plan) -> None:
        change_adapters(state, old, new, layout=controller.layout)
        if resets:
            reset_moments(state)

    engine, switch = transition(engine, plan, edit=edit, keep_frozen=keep_frozen, parked=later)
    return engine, Change(switch)


def change_adapters(state: EngineState, before: Plan, after: Plan, *, layout: Layout) -> None:
    """Make the adapters in an exported state those of the plan ``after``, as an edit for `transition`. Collective."""
    if after.cycle != before.cycle:
        fold_adapters(state, before, after, layout=layout)
    else:
        resize_adapters(state, before, after, layout=layout)
    start_from_updates(state, before, after, layout=layout)


def _merge(engine: Engine, phase: PhaseState, controller: PhaseController,
           keep_frozen: KeepFrozen | None) -> MergeReport:
    """Merge the adapters, and save the frozen weights that came of it for later checkpoints. Collective."""
    merge = controller.phases[phase.index].merge
    assert merge is not None, "only such a phase has cycles"
    report = merge_adapters(engine, phase.plan, merge.reset)
    if keep_frozen is not None:
        rest = frozen_slices(engine.ds, without=engine.parked.keys())
        keep_frozen(EngineState(rest | dict(engine.parked)), phase.plan)
    return report


def decide(run: Run, records: Records, state: RunState, step: int, norms: Mapping[str, Mapping[int, float]],
           spectra: Spectra) -> PhaseState:
    """Return the phase state after an observation, and record both.

    Collective. A decision after the last step is logged but not followed.
    """
    before = state.phase
    observation, after = decided(run.controller, state, step, norms, spectra)
    records.observation(observation)
    records.decision(before, after, step)
    return to_follow(run.controller, before, after, step)


def follow_plan(run: Run, records: Records, saver: Saver, engine: Engine, feed: DeviceFeed,
                phase: PhaseState, step: int, images: torch.Tensor) -> Engine:
    """Return the engine for the plan of ``phase`` after ``step``, and record the change. Collective.

    images: uint8 images [B, C, H, W] of this step. If the type of the frozen weights changes, rank 0's show how much
        the outputs do.
    """
    before = engine.plan
    probes = logits = None
    if {before.base_dtype, phase.plan.base_dtype} != {BF16} and phase.plan.structure() != before.structure():
        probes = _same_on_all_ranks(images[:PROBES].contiguous())
        logits = logits_of(engine, probes)

    engine, change = engine_for(engine, phase, run.controller, saver.save_frozen)
    if change.switch is not None:
        feed.rebatch(engine.config.train.micro_batch_size)
        records.plan(engine, phase, step, change.switch)
    if probes is not None and logits is not None:
        records.base(step, before, phase.plan, relative_change(logits, logits_of(engine, probes)))
    if change.merge is not None:
        merge = run.controller.phases[phase.index].merge
        assert merge is not None, "only such a phase merges"
        records.merge(step, phase.plan, merge.reset, change.merge)
    if change.chosen:
        records.active(step, phase)
    return engine


def _same_on_all_ranks(images: torch.Tensor) -> torch.Tensor:
    """Return rank 0's ``images``. Collective."""
    on_device = images.to(device())
    dist.broadcast(on_device, src=0)
    return on_device
