"""The loop, read top to bottom. The training step knows no phase: a window may change the plan, a plan the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prelora_ds.core.budget import predict_bytes, worst_deviation
from prelora_ds.core.config import Config
from prelora_ds.core.controller import PhaseController, PhaseState
from prelora_ds.core.convergence import Observation
from prelora_ds.core.errors import TrainingDivergedError
from prelora_ds.core.fields import Duration
from prelora_ds.core.plan import Layout
from prelora_ds.core.schedule import Timeline, lr_at
from prelora_ds.core.timing import gpu_named
from prelora_ds.data.batch import MicroBatch
from prelora_ds.data.budget import CorruptBudget
from prelora_ds.data.datasets import Look
from prelora_ds.data.loader import Loader, eval_batches
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.setup import TrainData, count_workers, make_loader, samples_per_epoch
from prelora_ds.engine.build import Engine, StepStats, build_engine
from prelora_ds.engine.census import census, peak_rss_bytes
from prelora_ds.engine.measure import check_ranks_agree, weight_norms
from prelora_ds.engine.runtime import (
    accelerator_name,
    freeze_imports,
    local_world_size,
    make_monitor,
    rank_memory_gib,
    synchronize,
)
from prelora_ds.engine.state import initial_state
from prelora_ds.engine.transition import Switch, transition
from prelora_ds.evaluate import Accuracy, evaluate
from prelora_ds.metrics import Meter, RunLog
from prelora_ds.model.families import find_layout
from prelora_ds.model.losses import begin_sigmoid_head
from prelora_ds.model.vit import build_model
from prelora_ds.reporting.export import export_model
from prelora_ds.reporting.plan import fastest_images_per_s
from prelora_ds.reporting.progress import TrainProgress

BYTES_MEASURED_AT = 3  # steps into a plan: ZeRO-3 frees parameters otherwise while it records its trace
DEVIATION_WARNING = 0.05


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: Config
    layout: Layout
    timeline: Timeline
    val_data: Manifest
    corrupt: CorruptBudget
    workers: int
    log: RunLog
    progress: TrainProgress
    out: Path


def train(config: Config, train_data: TrainData, val_data: Manifest) -> Accuracy:
    """Train from scratch to the end and export the model to ``run.output_dir/model``. Collective.

    Returns the accuracy of the last step's engine. Raises TrainingDivergedError when the loss or the gradient norm is
    not finite.
    """
    freeze_imports()
    rank, world, labels = dist.get_rank(), dist.get_world_size(), len(train_data.classes)
    torch.manual_seed(config.run.seed)
    module = build_model(config.model, labels)
    if config.train.loss == "sigmoid":
        begin_sigmoid_head(module, labels)
    layout = find_layout(module, config.lora.families, config.model.families)
    state = initial_state(module, rank, world)
    del module
    torch.manual_seed(config.run.seed + 1 + rank)  # dropout differs from rank to rank

    samples = samples_per_epoch(config, len(train_data))
    out, timeline = Path(config.run.output_dir), Timeline(samples, config.train.global_batch_size,
                                                          config.train.duration)
    controller = PhaseController(layout=layout, timeline=timeline, lora=config.lora, convergence=config.convergence,
                                 seed=config.run.seed)
    progress = TrainProgress(timeline.total_steps, shown=rank == 0)
    workers = _count_workers(config, train_data, progress)
    run = Run(config, layout, timeline, val_data, CorruptBudget(config.data.corrupt_budget, samples), workers,
              RunLog(out, make_monitor(out)), progress, out)
    phase = controller.initial()
    engine = build_engine(config, phase.plan, layout, labels, state)
    check_ranks_agree(engine)
    loader = make_loader(config, train_data, rank=rank, world_size=world, workers=workers)
    try:
        engine, accuracy = _loop(run, engine, phase, controller, loader)
        export_model(engine, out / "model")
        peaks = [0] * world
        dist.all_gather_object(peaks, peak_rss_bytes())
        run.log.plans({"event": "end", "step": timeline.total_steps, "peak_rss_bytes": peaks})
    finally:
        loader.close()
        run.progress.close()
        run.log.close()
    return accuracy


def _loop(run: Run, engine: Engine, phase: PhaseState, controller: PhaseController,
          loader: Loader) -> tuple[Engine, Accuracy]:
    config, timeline, total = run.config, run.timeline, run.timeline.total_steps
    normed_at = timeline.ticks(Duration("1 epoch"))
    measured_at = timeline.ticks(config.convergence.every) if config.convergence else frozenset()
    evaluated_at = timeline.ticks(config.train.eval_every)
    window, logged, accuracy = Meter(), Meter(), None
    _begin_plan(run, engine, phase, switch=None)

    for step in range(1, total + 1):
        begun = time.perf_counter()
        micro_batches = loader.next()
        fetched = time.perf_counter()
        lr = lr_at(step, timeline=timeline, config=config.optimizer)
        engine.backward(micro_batches)
        if step == phase.plan.since_step + BYTES_MEASURED_AT:
            _log_bytes(run, engine, step)
        stats = engine.finish_step(lr=lr)
        synchronize()
        for meter in (window, logged):
            meter.add(stats.loss, config.train.global_batch_size, step_s=time.perf_counter() - fetched,
                      data_s=fetched - begun, corrupt=stats.corrupt)
        row: dict[str, Any] = {"step": step, "epoch": timeline.epoch_at(step), "phase": phase.plan.phase}
        _stop_if_diverged(run, stats, row | logged.row())
        _stop_if_corrupt(run, stats, micro_batches, row | logged.row())
        if step in evaluated_at:
            accuracy = _evaluate(run, engine)
            row |= {"val/acc1": accuracy.acc1, "val/loss": accuracy.loss}
        if step in measured_at | normed_at:
            norms = weight_norms(engine)
            row |= {f"norm/{family}.{i:02d}": norm for family, layers in norms.items() for i, norm in layers.items()}
        if step in measured_at:
            phase = _decide(run, controller, phase, window.observation(step, norms))
            window.reset()
        if len(row) > 3 or step % config.train.log_every == 0:
            row |= {"lr": lr, "grad_norm": stats.grad_norm, **logged.row()}
            run.log.metrics(row, samples=step * config.train.global_batch_size)
            run.progress.step(row)
            logged.reset()
        if phase.plan != engine.plan and step < total:
            engine, switch = transition(engine, phase.plan, base_dir=run.out / "base")
            loader.rebatch(engine.config.train.micro_batch_size)
            _begin_plan(run, engine, phase, switch)
    assert accuracy is not None, "the last step is a tick of every duration"
    return engine, accuracy


def _decide(run: Run, controller: PhaseController, phase: PhaseState, observation: Observation) -> PhaseState:
    """Rank 0 decides, all ranks take its decision."""
    decision = [controller.next(phase, observation).to_json() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(decision, src=0)
    after = PhaseState.from_json(decision[0] or {})
    if len(after.windows) > len(phase.windows):
        run.log.windows({"phase": phase.plan.phase, **after.windows[-1].to_json(), "tests": after.tests,
                         "verdict": after.reason if after.tests > phase.tests else None})
        if after.tests > phase.tests:
            run.progress.say(f"window {after.windows[-1].index}: {after.reason}")
    return after


def _begin_plan(run: Run, engine: Engine, phase: PhaseState, switch: Switch | None) -> None:
    """Lend the run's monitor to the engine and record the plan, its reason and the bytes predicted for it."""
    if run.log.monitor is not None:
        engine.ds.monitor = run.log.monitor
    shapes = engine.plan.parameters(run.layout)
    trainable = sum(math.prod(shapes[name]) for name in engine.plan.trainable)
    run.log.plans({"event": "plan", "step": engine.plan.since_step, "phase": engine.plan.phase, "reason": phase.reason,
                   "trainable_parameters": trainable, "all_parameters": sum(map(math.prod, shapes.values())),
                   "switch": None if switch is None else switch.to_json(), "plan": engine.plan.to_json()})
    if switch is not None:
        run.progress.say(f"-> {engine.plan.phase} after step {engine.plan.since_step}: {phase.reason}; {trainable:,} "
                         f"parameters train; {switch.released_bytes / 2**20:,.1f} MiB released, all of it gone, "
                         f"{switch.seconds:.1f} s")


def _log_bytes(run: Run, engine: Engine, step: int) -> None:
    """Predicted against measured bytes of this rank at the end of a backward pass; a warning where they differ."""
    predicted = predict_bytes(engine.plan, run.layout, engine.config.zero, dist.get_world_size(), after_backward=True,
                              lora_mode=engine.config.lora_mode())
    measured = census(engine)
    off = worst_deviation(predicted, measured)
    run.log.plans({"event": "bytes", "step": step, "phase": engine.plan.phase, "predicted": predicted.to_json(),
                   "measured": measured, "worst_deviation": off})
    if off > DEVIATION_WARNING:
        run.progress.say(f"warning: bytes of phase {engine.plan.phase} differ by {off:.1%} from the prediction: "
                         f"predicted {predicted.to_json()}, measured {measured}")


def _stop_if_diverged(run: Run, stats: StepStats, row: dict[str, Any]) -> None:
    if stats.skipped or not (math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)):
        run.log.metrics(row, samples=row["step"] * run.config.train.global_batch_size)
        raise TrainingDivergedError(f"step {row['step']}, phase {row['phase']}: the loss is {stats.loss} and the "
                                    f"gradient norm {stats.grad_norm}\n  remedy: a lower optimizer.lr, a longer "
                                    "optimizer.warmup, or a smaller optimizer.clip_grad_norm")


def _stop_if_corrupt(run: Run, stats: StepStats, micro_batches: Sequence[MicroBatch], row: dict[str, Any]) -> None:
    """All ranks stop at the same step: they hold the same counts."""
    faults = [fault for batch in micro_batches for fault in batch.faults]
    if run.corrupt.spent(run.timeline.epochs_done(row["step"] - 1), stats.corrupt, faults):
        run.log.metrics(row, samples=row["step"] * run.config.train.global_batch_size)
        last = [""] * dist.get_world_size()
        dist.all_gather_object(last, run.corrupt.last_fault)
        raise run.corrupt.error(last)


def _evaluate(run: Run, engine: Engine) -> Accuracy:
    batches = eval_batches(run.val_data, Look.of(run.config.model, run.config.data), rank=dist.get_rank(),
                           world_size=dist.get_world_size(), batch_size=run.config.train.micro_batch_size,
                           workers=run.workers, worker_start=run.config.data.worker_start)
    with engine.evaluating() as logits:
        return evaluate(logits, batches, samples=len(run.val_data), reduce=dist.all_reduce, device=engine.ds.device)


def _count_workers(config: Config, data: TrainData, progress: TrainProgress) -> int:
    """The same on all ranks, by rank 0's measurement."""
    chosen = [(0, "")]
    if dist.get_rank() == 0:
        here = local_world_size()
        gpu = gpu_named(accelerator_name(), rank_memory_gib(here))
        chosen = [count_workers(config, data, ranks_here=here, images_per_s=fastest_images_per_s(
            config, here, dist.get_world_size(), gpu))]
    dist.broadcast_object_list(chosen, src=0)
    if config.data.workers == "auto":
        progress.say(chosen[0][1])
    return chosen[0][0]
