"""The loop, read top to bottom. The training step knows no phase: a window may change the plan, a plan the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prelora_ds.config.tree import Config
from prelora_ds.core.codec import from_json, to_json
from prelora_ds.core.controller import PhaseController, PhaseState
from prelora_ds.core.divergence import DivergenceWatch
from prelora_ds.core.duration import Duration
from prelora_ds.core.schedule import Timeline, lr_at
from prelora_ds.core.stragglers import StragglerWatch
from prelora_ds.core.switch_tests.prelora import Observation
from prelora_ds.data.batch import MicroBatch
from prelora_ds.data.corrupt import CorruptBudget
from prelora_ds.data.datasets import Look
from prelora_ds.data.loader import Loader, eval_batches
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.setup import TrainData, identity, make_loader, samples_per_epoch
from prelora_ds.engine.build import Engine, StepStats, build_engine
from prelora_ds.engine.census import peak_rss_bytes
from prelora_ds.engine.measure import check_ranks_agree, weight_norms
from prelora_ds.engine.rng import seed_rng
from prelora_ds.engine.runtime import freeze_imports, make_monitor, on_rank_0, synchronize
from prelora_ds.engine.state import initial_state
from prelora_ds.engine.transition import release_checked, transition
from prelora_ds.errors import TrainingDivergedError
from prelora_ds.exporting.hf import export_model
from prelora_ds.model.families import find_layout
from prelora_ds.model.losses import begin_sigmoid_head
from prelora_ds.model.vit import build_model
from prelora_ds.reporting.progress import TrainProgress
from prelora_ds.run.checkpoints.resume import Checkpoint, load_newest, prepare
from prelora_ds.run.checkpoints.saver import Saver
from prelora_ds.run.evaluate import Accuracy, evaluate
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.guard import Guard
from prelora_ds.run.log import EventKind, Meter, RunLog
from prelora_ds.run.records import Run, begin_plan, bytes_due, lend_monitor, log_bytes, workers_of
from prelora_ds.run.recover import problem_of, way_back
from prelora_ds.run.run_state import RunState
from prelora_ds.run.stop import StopRequest


def train(config: Config, train_data: TrainData, val_data: Manifest, hosts: Sequence[str], *,
          sources: Sequence[Path] = (), origin: str | None = None, stop: StopRequest | None = None,
          guard: Guard | None = None) -> Accuracy:
    """Train to the end, from scratch or a checkpoint, and export the model to ``run.output_dir/model``. Collective.

    hosts: that of each rank. sources: the checkpoints to go on from, newest first, as `claim_output` found them; rank
    0's count, and its origin.
    Returns the accuracy of the last step's engine. Raises TrainingDivergedError when the loss or the gradient norm is
    not as it should be, Stopped when ``stop`` asked for it and a checkpoint was written, NotSavedError when it was not.
    """
    freeze_imports()
    folder, rank = RunFolder(Path(config.run.output_dir)), dist.get_rank()
    samples = samples_per_epoch(config, len(train_data))
    timeline = Timeline(samples, config.train.global_batch_size, config.train.duration)
    with torch.device("meta"):
        layout = find_layout(build_model(config.model, len(train_data.classes)), config.families(),
                             config.model.families)
    saver = Saver(folder, config, timeline, say=partial(print, flush=True) if rank == 0 else lambda text: None,
                  data=identity(train_data, val_data), classes=train_data.classes)
    found = load_newest(sources, layout, saver.say)
    done = prepare(folder, found, origin)
    progress = TrainProgress(timeline.total_steps, shown=rank == 0, done=done)
    saver.say = progress.say
    run = Run(config, layout, timeline, train_data, val_data, CorruptBudget(config.data.corrupt_budget, samples),
              workers_of(config, train_data, progress, layout),
              RunLog(folder, make_monitor(folder.tensorboard, done * config.train.global_batch_size, progress.say),
                     progress.say), progress, folder,
              guard or Guard(math.inf), hosts)
    try:
        engine, state = _begin(run, saver, found)
        if stop is not None:
            stop.begin_steps()
        engine, state = _loop(run, saver, stop or StopRequest(), engine, state)
        export_model(engine, folder.model, train_data.classes)
        peaks = [0] * dist.get_world_size()
        dist.all_gather_object(peaks, peak_rss_bytes())
        run.log.event(EventKind.END, timeline.total_steps, peak_rss_bytes=peaks, data=identity(train_data, val_data))
    finally:
        run.opened.close()
        saver.close()
        run.progress.close()
        run.log.close()
    assert state.accuracy is not None, "the last step is a tick of every duration"
    return state.accuracy


def _begin(run: Run, saver: Saver, found: Checkpoint | None) -> tuple[Engine, RunState]:
    """Engine and state at the first step of all, or as ``found`` has them."""
    config, labels = run.config, len(run.train_data.classes)
    if found is None:
        torch.manual_seed(config.run.seed)
        module = build_model(config.model, labels)
        if config.train.loss == "sigmoid":
            begin_sigmoid_head(module, labels)
        host = initial_state(module, dist.get_rank(), dist.get_world_size())
        del module
        seed_rng(config.run.seed, dist.get_rank())  # dropout differs from rank to rank
        state = RunState(0, _controller(run).initial(), DivergenceWatch())
        engine = build_engine(config, state.phase.plan, run.layout, labels, host)
    else:
        state, saver.base, saver.last_step = found.run, found.manifest.base, found.run.step
        engine = build_engine(config, state.phase.plan, run.layout, labels, found.engine, found.counters)
        found.restore_rng(config.run.seed)
        run.corrupt.go_on(*state.corrupt)
        run.log.event(EventKind.RESUME, state.step, checkpoint=found.folder.name, world_size=dist.get_world_size(),
                      zero_stage=engine.config.zero.stage)
        run.progress.say(f"goes on after step {state.step}, from {found.folder}")
    check_ranks_agree(engine)
    lend_monitor(run, engine)
    if found is None or not found.of_run(run.folder):
        state.phase, state.window = replace(state.phase, open=()), Meter()  # a new run may measure otherwise
        state.best_acc1 = None  # and has no checkpoint of that accuracy
        begin_plan(run, engine, state.phase, switch=None)
    return engine, state


def _loop(run: Run, saver: Saver, stop: StopRequest, engine: Engine, state: RunState) -> tuple[Engine, RunState]:
    config, timeline, total, controller = run.config, run.timeline, run.timeline.total_steps, _controller(run)
    normed_at = timeline.ticks(Duration("1 epoch"))
    observed_at = timeline.ticks(config.observe.every)
    evaluated_at, saved_at = timeline.ticks(config.train.eval_every), saver.ticks
    loader, begun_at = _loader(run, engine, state.step), state.step
    stragglers = StragglerWatch(run.hosts)

    while state.step < total:
        step, begun = state.step + 1, time.perf_counter()
        micro_batches = loader.next()
        fetched = time.perf_counter()
        lr = lr_at(step, engine.plan, timeline=timeline, schedule=config.optimizer)
        engine.backward(micro_batches)
        if step == bytes_due(engine.plan, begun_at):
            log_bytes(run, engine, step)
        stats = engine.finish_step(lr=lr, flags=(stop.asked(saver.slowest_s), saver.writing), data_s=fetched - begun,
                                   accept=partial(state.watch.accepts, step, limits=config.train.divergence))
        synchronize()
        seconds = {"step_s": time.perf_counter() - fetched, "data_s": fetched - begun}
        for slow in stragglers.add(sum(seconds.values()), forward=stats.forward_s, data=stats.data_s):
            run.progress.say(f"warning: {slow}")
            run.log.event(EventKind.STRAGGLER, step, **to_json(slow))
        row: dict[str, Any] = {"step": step, "epoch": timeline.epoch_at(step), "phase": engine.plan.phase}
        _stop_if_corrupt(run, stats, micro_batches, row)
        if problem := problem_of(state.watch, step, stats, config.train.divergence):
            back = _way_back(run, saver, state, stats, row, problem)
            if back is not None:
                run.opened.close()  # the loader; a closed one shall not be kept until the run ends
                engine, state = _go_back(run, saver, engine, back)
                loader, begun_at = _loader(run, engine, state.step), state.step
                continue
        if stats.skipped:
            state.watch = state.watch.skipped()
            row |= {"left_out": state.watch.left_out, "left_out_loss": stats.loss}
        else:
            state.watch = state.watch.sound(stats.loss, config.train.divergence)
            for meter in (state.window, state.logged):
                meter.add(stats.loss, config.train.global_batch_size, corrupt=stats.corrupt, **seconds)
        best = False
        if step in evaluated_at:
            accuracy = _evaluate(run, engine)
            best = state.evaluated(step, accuracy)
            row |= {"val/acc1": accuracy.acc1, "val/loss": accuracy.loss}
        if step in observed_at | normed_at:
            norms = weight_norms(engine)
            row |= {f"norm/{family}.{i:02d}": norm for family, layers in norms.items() for i, norm in layers.items()}
        if step in observed_at and state.window.steps:
            observation = state.window.observation(step, norms)
            run.log.observation(observation)
            state.phase = _decide(run, controller, state.phase, observation)
            state.window.reset()
        if len(row) > 3 or step % config.train.log_every == 0:
            row |= {"lr": lr, "grad_norm": stats.grad_norm, **state.logged.row()}
            run.log.metrics(row, samples=step * config.train.global_batch_size)
            run.progress.step(row)
            state.logged.reset()
        state.step, state.corrupt = step, run.corrupt.count
        if state.phase.plan != engine.plan and step < total:
            engine, switch = transition(engine, state.phase.plan, keep_frozen=saver.keep_frozen)
            loader.rebatch(engine.config.train.micro_batch_size)
            begin_plan(run, engine, state.phase, switch)
        due = step in saved_at or (best and saver.keeps_best)
        saver.after_step(engine, state, *stats.flags, due=due, why=stop.reason)
        run.guard.beat()
    saver.settle()
    return engine, state


def _way_back(run: Run, saver: Saver, state: RunState, stats: StepStats, row: dict[str, Any],
              problem: str) -> Checkpoint | None:
    try:
        return way_back(saver, run.layout, run.folder, state, stats, row["step"], problem, run.config.train.divergence)
    except TrainingDivergedError:
        run.log.metrics({**row, "train/loss": stats.loss, "grad_norm": stats.grad_norm},
                        samples=row["step"] * run.config.train.global_batch_size)
        raise


def _go_back(run: Run, saver: Saver, engine: Engine, found: Checkpoint) -> tuple[Engine, RunState]:
    release_checked(engine)
    samples = found.run.step * run.config.train.global_batch_size
    run.log.rewind(lambda: (prepare(run.folder, found),
                            make_monitor(run.folder.tensorboard, samples, run.progress.say))[1])
    return _begin(run, saver, found)


def _decide(run: Run, controller: PhaseController, phase: PhaseState, observation: Observation) -> PhaseState:
    """Rank 0 decides, all ranks take its decision."""
    after = from_json(PhaseState, on_rank_0(lambda: to_json(controller.next(phase, observation))))
    if [w.index for w in after.windows[-1:]] != [w.index for w in phase.windows[-1:]]:
        run.log.windows({"phase": phase.plan.phase, **to_json(after.windows[-1]), "tests": after.tests,
                         "verdict": after.reason if after.tests > phase.tests else None})
        if after.tests > phase.tests:
            run.progress.say(f"window {after.windows[-1].index}: {after.reason}")
    return after


def _stop_if_corrupt(run: Run, stats: StepStats, micro_batches: Sequence[MicroBatch], row: dict[str, Any]) -> None:
    """All ranks stop at the same step: they hold the same counts."""
    faults = [fault for batch in micro_batches for fault in batch.faults]
    if run.corrupt.spent(run.timeline.epochs_done(row["step"] - 1), stats.corrupt, faults):
        run.log.metrics({**row, "train/loss": stats.loss, "data/corrupt": stats.corrupt},
                        samples=row["step"] * run.config.train.global_batch_size)
        last = [""] * dist.get_world_size()
        dist.all_gather_object(last, run.corrupt.last_fault)
        raise run.corrupt.error(last)


def _evaluate(run: Run, engine: Engine) -> Accuracy:
    batches = eval_batches(run.val_data, Look.of(run.config.model, run.config.data), rank=dist.get_rank(),
                           world_size=dist.get_world_size(), batch_size=run.config.train.micro_batch_size,
                           workers=run.workers, worker_start=run.config.data.worker_start)
    with engine.evaluating() as logits:
        return evaluate(lambda images: run.guard.beat() or logits(images), batches,
                        samples=len(run.val_data), reduce=dist.all_reduce, device=engine.ds.device)


def _loader(run: Run, engine: Engine, start_step: int) -> Loader:
    loader = make_loader(engine.config, run.train_data, rank=dist.get_rank(), world_size=dist.get_world_size(),
                         workers=run.workers, start_step=start_step)
    run.opened.callback(loader.close)
    return loader


def _controller(run: Run) -> PhaseController:
    return PhaseController(layout=run.layout, timeline=run.timeline, phases=run.config.specs(),
                           seed=run.config.run.seed)

