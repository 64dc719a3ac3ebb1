"""What stays the same in a run, and what it records of itself beside its steps: each plan, and its bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist

from prelora_ds.config.tree import Config
from prelora_ds.core.codec import to_json
from prelora_ds.core.controller import PhaseState
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.core.schedule import Timeline
from prelora_ds.cost.bytes import predict_bytes, worst_deviation
from prelora_ds.cost.forecast import fastest_images_per_s
from prelora_ds.cost.timing import gpu_named
from prelora_ds.data.corrupt import CorruptBudget
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.setup import TrainData, count_workers
from prelora_ds.engine.build import Engine
from prelora_ds.engine.census import census
from prelora_ds.engine.runtime import accelerator_name, local_world_size, on_rank_0, rank_memory_gib
from prelora_ds.engine.transition import Switch
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.guard import Guard
from prelora_ds.run.log import EventKind, RunLog

BYTES_MEASURED_AT = 3  # steps into a plan: ZeRO-3 frees parameters otherwise while it records its trace
DEVIATION_WARNING = 0.05


class Progress(Protocol):
    """What a run tells whoever watches its terminal."""

    def say(self, text: str) -> None: ...

    def step(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: Config
    layout: Layout
    timeline: Timeline
    train_data: TrainData
    val_data: Manifest
    corrupt: CorruptBudget
    workers: int
    log: RunLog
    progress: Progress
    folder: RunFolder
    guard: Guard
    hosts: Sequence[str]  # of each rank
    opened: ExitStack = field(default_factory=ExitStack)  # what the loop opens and the end of the run closes


def workers_of(config: Config, data: TrainData, progress: Progress, layout: Layout) -> int:
    """`data.workers`, by rank 0's measurement where it is ``auto``. Collective."""
    if config.data.workers != "auto":
        return config.data.workers

    def measure() -> tuple[int, str]:
        here = local_world_size()
        gpu = gpu_named(accelerator_name(), rank_memory_gib(here))
        fastest = fastest_images_per_s(config, layout, here, dist.get_world_size(), gpu)
        return count_workers(config, data, ranks_here=here, images_per_s=fastest)

    workers, why = on_rank_0(measure)
    progress.say(why)
    return workers


def begin_plan(run: Run, engine: Engine, phase: PhaseState, switch: Switch | None) -> None:
    """Lend the run's monitor to the engine and record the plan and its reason."""
    lend_monitor(run, engine)
    shapes = engine.plan.parameters(run.layout)
    trainable = sum(math.prod(shapes[name]) for name in engine.plan.trainable)
    run.log.event(EventKind.PLAN, engine.plan.since_step, phase=engine.plan.phase, reason=phase.reason,
                  trainable_parameters=trainable, all_parameters=sum(map(math.prod, shapes.values())),
                  switch=to_json(switch), plan=to_json(engine.plan))
    if switch is not None:
        run.progress.say(f"-> {engine.plan.phase} after step {engine.plan.since_step}: {phase.reason}; {trainable:,} "
                         f"parameters train; {switch.released_bytes / 2**20:,.1f} MiB released, all of it gone, "
                         f"{switch.seconds:.1f} s")


def lend_monitor(run: Run, engine: Engine) -> None:
    if run.log.monitor is not None:
        engine.ds.monitor = run.log.monitor


def bytes_due(plan: Plan, begun_at: int) -> int:
    """The step at which the bytes of ``plan`` are measured, in a job that began after step ``begun_at``.

    A plan is measured once in each job that trains by it, because a job may run at another ZeRO
    stage or on another number of ranks.
    """
    return max(plan.since_step, begun_at) + BYTES_MEASURED_AT


def log_bytes(run: Run, engine: Engine, step: int) -> None:
    """Predicted against measured bytes of this rank at the end of a backward pass; a warning where they differ."""
    predicted = predict_bytes(engine.plan, run.layout, engine.config.zero, dist.get_world_size(), after_backward=True,
                              kernel=engine.config.kernel())
    measured = census(engine)
    off = worst_deviation(predicted, measured)
    run.log.event(EventKind.BYTES, step, phase=engine.plan.phase, predicted=to_json(predicted), measured=measured,
                  worst_deviation=off)
    if off > DEVIATION_WARNING:
        run.progress.say(f"warning: bytes of phase {engine.plan.phase} differ by {off:.1%} from the prediction: "
                         f"predicted {to_json(predicted)}, measured {measured}")
