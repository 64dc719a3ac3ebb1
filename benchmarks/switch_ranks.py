"""The rank functions of switch.py: timed switches, and engines that are released in two ways."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from support.plans import full_plan, lora_plan, warmup_plan

from prelora_ds.config.load import validate
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.data.batch import MicroBatch
from prelora_ds.engine import build as build_module
from prelora_ds.engine import transition as transition_module
from prelora_ds.engine.build import build_engine, deepspeed_config
from prelora_ds.engine.census import (
    engine_storages,
    live_storages,
    peak_rss_bytes,
    rss_bytes,
    wait_until,
)
from prelora_ds.engine.engine import Engine
from prelora_ds.engine.release import release, trim_memory
from prelora_ds.engine.runtime import freeze_imports
from prelora_ds.engine.state import EngineState, Slice, initial_state
from prelora_ds.engine.transition import transition
from prelora_ds.model.families import find_layout
from prelora_ds.model.vit import build_model
from prelora_ds.run.checkpoints import part as checkpoint_module

LABELS = 1000
SETTLE = 5  # rebuilds before growth is measured, while caches fill and glibc's heap settles
# Part of a switch -> the function that does it, in the module where the switch looks it up.
PARTS = {
    "count what it owns": (transition_module, "engine_storages"),
    "export": (transition_module, "export_state"),
    "release": (transition_module, "release"),
    "prove it gone": (transition_module, "wait_until"),
    "write the base": (checkpoint_module, "write_part"),
    "build: module": (build_module, "empty_module"),
    "build: initialize": (deepspeed, "initialize"),
    "restore": (build_module, "restore_state"),
    "do ranks agree": (transition_module, "check_ranks_agree"),
}


def switches(
    pipe: Connection, model: Mapping[str, Any], micro: int, steps: int, folder: Path
) -> dict[str, Any]:
    """Time ``steps`` full-phase steps and the parts of both switches on this rank.

    Returns the seconds, and the peak bytes of the steps and of each switch.
    """
    engine, (full, warmup, lora) = first_engine(model, micro, stage=2)
    one_step(engine)  # the first step creates the moments
    reset_peak()
    report: dict[str, Any] = {
        "steps": [one_step(engine) for _ in range(steps)],
        "step_peak_rss": peak_rss_bytes(),
        "live_bytes": sum(live_storages().values()),
        "copy_bytes_s": copy_bytes_per_second(),
        "elements": elements(full, engine.layout),
    }
    for name, plan in (("full -> warmup", warmup), ("warmup -> lora", lora)):
        trained_before = elements(engine.plan, engine.layout)
        reset_peak()
        with stopwatch() as (seconds, live, seconds_of_counting):
            engine, switch = transition(engine, plan, keep_frozen=partial(write_base, folder))
        total = switch.seconds - sum(seconds_of_counting)
        report[name] = {
            "parts": {**seconds, "the rest": total - sum(seconds.values())},
            "seconds": total,
            "peak_rss": peak_rss_bytes(),
            "live_bytes": max(live),
            "elements": (trained_before, elements(plan, engine.layout)),
        }
        if plan is warmup:
            one_step(engine)  # the adapters need moments for the next switch to carry
    return report


def write_base(folder: Path, state: EngineState, plan: Plan) -> None:
    """Write the newly frozen parameters like a run, but without the vote of the ranks."""
    frozen = EngineState(
        {
            name: Slice(s.start, s.value)
            for name, s in state.slices.items()
            if name not in plan.trainable
        }
    )
    if frozen.slices:
        name = checkpoint_module.part_name(
            torch.distributed.get_rank(), torch.distributed.get_world_size()
        )
        checkpoint_module.write_part(frozen, folder / name)


@contextlib.contextmanager
def stopwatch() -> Iterator[tuple[dict[str, float], list[int], list[float]]]:
    """Time the parts of the switches in the context.

    Yields the seconds of each part, the live tensor bytes after each call of a part, and the
    seconds spent on counting these.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    live: list[int] = []
    counting: list[float] = []

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            result = function(*args, **options)
            done = time.perf_counter()
            seconds[part] += done - begun
            live.append(sum(live_storages().values()))
            counting.append(time.perf_counter() - done)
            return result

        return call

    with contextlib.ExitStack() as stack:
        for part, (module, name) in PARTS.items():
            stack.enter_context(patch.object(module, name, clocked(part, getattr(module, name))))
        yield seconds, live, counting


def freed_by_us(pipe: Connection, model: Mapping[str, Any], stage: int) -> tuple[int, float]:
    """Return the bytes of an engine with its weights, and the share of them that `release` frees."""
    engine, _ = first_engine(model, micro=4, stage=stage)
    one_step(engine)
    owned = engine_storages(engine)
    release(engine)
    return sum(owned.values()), freed_share(owned)


def freed_by_hand(
    pipe: Connection, model: Mapping[str, Any], stage: int, keep_module: bool
) -> tuple[int, float]:
    """Return the bytes of an engine, and the share of them that is freed by hand.

    By hand means `engine.destroy(); del engine, optimizer; gc.collect()`. The module's weights are
    not counted, because the next engine needs them.
    """
    engine, _ = first_engine(model, micro=4, stage=stage)
    one_step(engine)
    module, ds = engine.module, engine.ds
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    owned = {key: nbytes for key, nbytes in engine_storages(engine).items() if key not in weights}
    ds.destroy()
    del ds, engine
    if not keep_module:
        del module
    gc.collect()
    return sum(owned.values()), freed_share(owned)


def rebuilt_by_us(pipe: Connection, model: Mapping[str, Any], rebuilds: int) -> tuple[float, float]:
    """Return the seconds per rebuild, and the growth of resident bytes over ``rebuilds``."""
    engine, (full, *_) = first_engine(model, micro=4, stage=2)
    rss, seconds = [], []
    for _ in range(SETTLE + rebuilds):
        one_step(engine)
        engine, switch = transition(engine, full)
        seconds.append(switch.seconds)
        trim_memory()
        rss.append(rss_bytes())
    return median(seconds), growth(rss)


def rebuilt_by_hand(
    pipe: Connection, model: Mapping[str, Any], rebuilds: int
) -> tuple[float, float]:
    """Return the same as `rebuilt_by_us`, with engines that are released by hand.

    Each new engine is built on the same module, and no state is carried over.
    """
    engine, (full, *_) = first_engine(model, micro=4, stage=2)
    module = engine.module
    ds_config = deepspeed_config(
        engine.config, full, engine.layout, torch.distributed.get_world_size()
    )
    rss, seconds = [], []
    for _ in range(SETTLE + rebuilds):
        one_step(engine)
        begun = time.perf_counter()
        engine.ds.destroy()
        engine.ds = None  # our last reference
        gc.collect()
        optimizer = torch.optim.AdamW([{"params": list(module.parameters()), "lr_scale": 1.0}])
        engine.ds, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        del optimizer
        seconds.append(time.perf_counter() - begun)
        trim_memory()
        rss.append(rss_bytes())
    return median(seconds), growth(rss)


def freed_share(owned: Mapping[int, int]) -> float:
    """Return the share of ``owned`` (address -> bytes) whose storages are gone."""

    def bytes_alive() -> int:
        return sum(nbytes for key, nbytes in live_storages().items() if key in owned)

    return 1 - wait_until(bytes_alive, lambda n: n == 0) / sum(owned.values())


def growth(rss: list[int]) -> float:
    """Return the resident bytes after the last rebuilds minus those after the first ones."""
    return median(rss[-3:]) - median(rss[SETTLE - 3 : SETTLE])


def first_engine(
    model: Mapping[str, Any], micro: int, stage: int
) -> tuple[Engine, tuple[Plan, Plan, Plan]]:
    """Return an engine in the full phase, and all plans, with ranks 8, 16 and 32 in turn."""
    engine = new_engine(model, micro, stage, full_plan)
    ranks = {
        family: {layer: 8 << (i + layer) % 3 for layer in layers}
        for i, (family, layers) in enumerate(engine.layout.targets.items())
    }
    warmup = warmup_plan(engine.layout, ranks)
    return engine, (engine.plan, warmup, lora_plan(engine.layout, warmup))


def new_engine(
    model: Mapping[str, Any], micro: int, stage: int, plan_of: Callable[[Layout], Plan]
) -> Engine:
    """Return an engine with new weights under the plan that ``plan_of`` makes."""
    freeze_imports()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    cfg = validate(
        {
            "run": {"name": "benchmark", "output_dir": "-"},
            "model": dict(model),
            "data": {"train": "-", "val": "-"},
            "optimizer": {"warmup": "0 steps"},
            "train": {
                "duration": "100 steps",
                "global_batch_size": micro * world,
                "micro_batch_size": micro,
            },
            "deepspeed": {"zero_optimization": {"stage": stage}},
            "convergence": {"tau": 1.0, "zeta": 5.0},  # selects PreLoRA's phases
        },
        "a benchmark",
    )
    torch.manual_seed(0)
    module = build_model(cfg.model, LABELS)
    layout = find_layout(module, cfg.lora.families, cfg.model.families)
    state = initial_state(module, rank, world)
    del module
    return build_engine(cfg, plan_of(layout), layout, LABELS, state)


def one_step(engine: Engine, images_per_rank: int | None = None) -> float:
    """Take a training step on a random batch, by default of the config's size; return its seconds."""
    m = engine.config.model
    micro = images_per_rank or engine.config.train.micro_batch_size
    images = torch.randint(
        0, 256, (micro, m.num_channels, m.image_size, m.image_size), dtype=torch.uint8
    )
    labels = torch.randint(0, LABELS, (micro,))
    begun = time.perf_counter()
    engine.train_step([MicroBatch(images, labels)], lr=1e-4)
    return time.perf_counter() - begun


def elements(plan: Plan, layout: Layout) -> int:
    """Return the number of elements that train under ``plan``."""
    shapes = plan.parameters(layout)
    return sum(torch.Size(shapes[name]).numel() for name in plan.trainable)


def copy_bytes_per_second(nbytes: int = 2**28) -> float:
    """Return how many bytes per second this rank copies in memory while all ranks do so."""
    source = torch.zeros(nbytes, dtype=torch.uint8)
    target = source.clone()
    torch.distributed.barrier()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begun)
    return nbytes / median(seconds)


def reset_peak() -> None:
    """Reset the peak of the resident set (VmHWM)."""
    Path("/proc/self/clear_refs").write_text("5")
