"""The training loop, to be read from top to bottom.

A step is the same in every phase. An observation may change the plan, and a changed plan the
engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prelora_ds.config.tree import Config
from prelora_ds.core.controller import PhaseController
from prelora_ds.core.schedule import Timeline
from prelora_ds.cost.flops import step_flops
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.setup import TrainData, fingerprints, samples_per_epoch
from prelora_ds.engine.fp32_base import on_fp32_base
from prelora_ds.engine.measure import weight_norms
from prelora_ds.engine.runtime import freeze_imports
from prelora_ds.exporting.card import write_run_card
from prelora_ds.exporting.hf import export_model
from prelora_ds.model.families import find_layout
from prelora_ds.model.vit import build_model
from prelora_ds.reporting.progress import TrainProgress
from prelora_ds.run.autosize import resolve_workers
from prelora_ds.run.begin import begin, roll_back, spectrum_meter
from prelora_ds.run.checkpoints.resume import Checkpoint, load_newest, rewind_output
from prelora_ds.run.checkpoints.saver import Saver
from prelora_ds.run.context import Run
from prelora_ds.run.decide import decide, follow_plan
from prelora_ds.run.due import Due
from prelora_ds.run.evaluate import Accuracy, evaluate_engine
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.guard import Guard
from prelora_ds.run.log import norm_columns, stable_rank_columns
from prelora_ds.run.records import Records
from prelora_ds.run.recover import check_samples, recover
from prelora_ds.run.setup_record import SetupRecord, job_end, write_setup
from prelora_ds.run.stop import StopRequest


def train(config: Config, train_data: TrainData, val_data: Manifest, hosts: Sequence[str], *,
          resume_candidates: Sequence[Path] = (), resumed_from: str | None = None,
          stop: StopRequest | None = None, guard: Guard | None = None) -> Accuracy:
    """Train to the end, from scratch or a checkpoint, and export the model.

    hosts: the host name of each rank.
    resume_candidates, resumed_from: as in `Claim`; only rank 0's values are used.

    The model is exported to ``run.output_dir/model``. Collective. Returns the accuracy of the
    weights after the last step. Raises TrainingDivergedError if training diverges,
    CorruptBudgetError if too many samples cannot be read, Stopped if ``stop`` requested it and a
    checkpoint was written, and NotSavedError if it could not be written.
    """
    freeze_imports()
    folder = RunFolder(Path(config.run.output_dir))
    rank_0 = dist.get_rank() == 0
    timeline = Timeline(samples_per_epoch(config, len(train_data)), config.train.global_batch_size,
                        config.train.duration)
    with torch.device("meta"):
        module = build_model(config.model, len(train_data.classes))
    layout = find_layout(module, config.families(), config.model.families)
    controller = PhaseController(layout=layout, timeline=timeline, phases=config.specs(),
                                 seed=config.run.seed, step_flops=step_flops(config, layout))

    say: Callable[[str], None] = partial(print, flush=True) if rank_0 else lambda text: None
    setup = SetupRecord(layout, timeline.samples, dist.get_world_size(), job_end())
    warning = write_setup(folder, setup) if rank_0 else None
    if warning is not None:
        say(warning)
    checkpoint = load_newest(resume_candidates, folder, layout, say)
    done = rewind_output(folder, checkpoint, resumed_from)

    with ExitStack() as cleanup:
        progress = TrainProgress(timeline.total_steps, shown=rank_0, done=done)
        cleanup.callback(progress.close)
        workers = resolve_workers(config, train_data, layout, progress.say)
        run = Run(config, layout, timeline, controller, train_data, val_data, workers, folder, hosts,
                  cleanup)
        records = Records(run, progress, done)
        cleanup.callback(records.close_logs)
        saver = Saver(folder, config, timeline, progress.say, fingerprints(train_data, val_data),
                      train_data.classes)
        cleanup.callback(saver.close)
        return loop(run, records, saver, stop or StopRequest(), guard or Guard(math.inf),
                    checkpoint)


def loop(run: Run, records: Records, saver: Saver, stop: StopRequest, guard: Guard,
         resume_from: Checkpoint | None) -> Accuracy:
    """Train from scratch or ``resume_from`` to the last step, and export the model. Collective."""
    config = run.config
    total = run.timeline.total_steps
    meter = spectrum_meter(run)
    engine, state = begin(run, records, saver, resume_from)
    records.begun(state)
    feed = run.feed(engine, state.step)
    due = Due(config, run.timeline, state.step)
    stop.begin_steps()

    while state.step < total:
        step = state.step + 1

        # One optimizer step: the same in every phase.
        micro_batches = feed.next()
        flags = (stop.asked(saver.slowest_s), saver.writing)
        engine.backward(micro_batches, flags=flags, data_s=feed.waited_s)
        if due.bytes(step, engine.plan):
            records.bytes(engine, step)
        away_s = feed.look_ahead() if step < total else 0.0
        lr, own_lr = run.controller.rates(state.phase, step, config.optimizer)
        accept = partial(state.watch.accepts, step, limits=config.train.divergence)
        cut = run.controller.cut(state.phase, step)
        stats = engine.finish_step(lr=lr, accept=accept, adapter_lr=own_lr, cut=cut, away_s=away_s)
        records.stragglers(step, stats)
        if stats.remaining:
            records.pruned(step, stats.remaining)

        # Stop, skip the update or roll back: too many unreadable samples, or a step that diverged.
        check_samples(run, records, engine, state, step, stats, micro_batches)
        checkpoint = recover(run, records, saver, engine, state, step, stats)
        if checkpoint is not None:
            feed.close()
            engine, state = roll_back(run, records, saver, engine, checkpoint)
            feed = run.feed(engine, state.step)
            due = Due(config, run.timeline, state.step)
            continue
        measured: dict[str, Any] = state.count(stats, config.train, data_s=feed.waited_s)

        # Measure, and let the controller decide the next phase.
        improved = False
        if due.evaluation(step):
            accuracy = evaluate_engine(engine, run.val_batches(), len(run.val_data),
                                       beat=guard.beat)
            improved = state.evaluated(step, accuracy)
            measured |= accuracy.columns()
        if due.norms(step):
            norms = weight_norms(engine)
            measured |= norm_columns(norms.effective)
            measured |= norm_columns(norms.base, "norm_base") | norm_columns(norms.adapter, "norm_adapter")
        if due.observation(step) and state.window.steps:
            spectra = {} if meter is None else meter.measure(engine, guard.beat)
            measured |= stable_rank_columns(spectra)
            state.phase = decide(run, records, state, step, norms.effective, spectra)
        state.phase = run.controller.after_step(state.phase, step, importance=stats.importance,
                                                updated=not stats.skipped)
        if measured or due.log(step):
            records.step(state, engine, step, stats, lr, measured)
        state.step = step

        # Follow a new plan: rebuild the engine, or change what trains on this one.
        engine = follow_plan(run, records, saver, engine, feed, state.phase, step, micro_batches[0].images)

        # Save, and report progress to the guard.
        save = due.checkpoint(step, improved=improved)
        saver.after_step(engine, state, *stats.flags, due=save, why=stop.reason)
        guard.beat()

    feed.close()
    saver.finish_pending()
    assert state.accuracy is not None, "the last step is a tick of every duration"
    if engine.plan.quantised():
        with on_fp32_base(engine):
            fp32 = evaluate_engine(engine, run.val_batches(), len(run.val_data), beat=guard.beat)
        records.accuracy(state.step, engine.plan, state.accuracy, fp32)
    export_model(engine, run.folder.model, run.train_data.classes, card=partial(write_run_card, run, state))
    records.end(state.phase)
    return state.accuracy
