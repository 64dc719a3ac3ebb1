"""The rank functions of zero_stages.py."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from lora_step import ranks_in_turn
from support.plans import full_plan, lora_plan, warmup_plan

from prelora_ds.config.adapters import FAMILIES
from prelora_ds.config.load import validate
from prelora_ds.config.tree import Config
from prelora_ds.core.codec import to_json
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.cost.bytes import predict_bytes, worst_deviation
from prelora_ds.cost.flops import communication, micro_batch
from prelora_ds.data.batch import MicroBatch
from prelora_ds.data.datasets import ImagePipeline
from prelora_ds.data.loader import TrainLoader
from prelora_ds.data.manifest import Manifest
from prelora_ds.engine import restore
from prelora_ds.engine.build import build_engine
from prelora_ds.engine.census import census, peak_rss_bytes, wait_until
from prelora_ds.engine.engine import Engine
from prelora_ds.engine.release import release
from prelora_ds.engine.runtime import freeze_imports, synchronize
from prelora_ds.engine.state import initial_state
from prelora_ds.engine.transition import transition
from prelora_ds.model.families import find_layout
from prelora_ds.model.vit import build_model

LABELS = 1000
GIB = 2**30
OWNERS = ("weights", "gradients", "masters", "moments", "buffers")
PARTS = ("data", "forward", "backward", "communication", "optimizer")
SENT = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


def phases(
    pipe: Connection,
    model: Mapping[str, Any],
    zero: Mapping[str, Any],
    sizes: Sequence[int],
    steps: int,
    shards: Path,
) -> list[dict[str, Any]]:
    """Return a row per phase for this rank. sizes: numbers of images per rank to time in turn."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    config = config_of(model, zero, sizes[0], world)
    freeze_imports()
    torch.manual_seed(0)
    module = build_model(config.model, LABELS)
    layout = find_layout(module, FAMILIES)
    full, *later = plans(layout)
    engine = build_engine(config, full, layout, LABELS, initial_state(module, rank, world))
    del module
    rows = []
    switch_s = None
    for plan in (full, *later):
        if plan is not full:
            engine, switch = transition(engine, plan)
            switch_s = switch.seconds
        if torch.cuda.is_available():
            # DeepSpeed 0.19 resets it too, at stage 1 and on rank 0 only (runtime/bf16_optimizer.py).
            torch.cuda.reset_peak_memory_stats()
        seconds: dict[int, dict[str, float]] = {}
        bytes_after_backward(
            engine, layout, world, size=1
        )  # creates the moments; ZeRO-3 records its trace
        predicted, measured = bytes_after_backward(engine, layout, world, size=sizes[0])
        for size in sizes:
            loader = TrainLoader(
                Manifest.load(shards),
                ImagePipeline.from_config(config.model, config.data),
                seed=0,
                workers=0,
                global_batch_size=size * world,
                micro_batch_size=size,
                rank=rank,
                world_size=world,
            )
            timed = [step(engine, loader) for _ in range(1 + steps)][1:]
            seconds[size] = {part: median(t[part] for t in timed) for part in ("step", *PARTS)}
            sent = timed[-1]["bytes"]
            loader.close()
        comm = communication(plan, layout, config.zero, 1)
        payload = comm.all_reduce + comm.all_gather + comm.reduce_scatter
        flops = {p.phase: micro_batch(config.model, p, layout, 1).flops for p in (full, plan)}
        rows.append(
            {
                "phase": plan.phase,
                **{f"{part} s": s for part, s in seconds[sizes[0]].items()},
                "switch s": switch_s,
                **owners(measured),
                "states off by": worst_deviation(predicted, measured),
                "sent GB": sent / 1e9,
                "sent off by": abs(sent - payload) / payload,
                "peak GiB": peak_bytes() / GIB,
                "FLOPs of full": flops[plan.phase] / flops[full.phase],
                "seconds": seconds,
                "predicted": to_json(predicted),
                "measured": measured,
            }
        )
    return rows


def states_at_world(
    pipe: Connection, model: Mapping[str, Any], zero: Mapping[str, Any], world: int
) -> list[dict[str, Any]]:
    """Return a row per phase for rank 0 of ``world`` ranks, the others of which are fake.

    A restore compares what all ranks hold with the plan. That is left out, because the fake ranks hold nothing.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    config = config_of(model, zero, 1, world)
    freeze_imports()
    rows = []
    with (patch.object(torch.distributed, "all_gather_object", _gather_own_object),
          patch.object(restore, "_check_fits", lambda engine, plan, layout, state: set(layout.parameters))):
        layout = find_layout(build_model(config.model, LABELS), FAMILIES)
        for plan in plans(layout):
            state = initial_state(build_model(config.model, LABELS), 0, world)
            engine = build_engine(config, plan, layout, LABELS, state)
            for _ in range(2):
                bytes_after_backward(engine, layout, world, size=1)
            predicted, measured = bytes_after_backward(engine, layout, world, size=1)
            rows.append(
                {
                    "phase": plan.phase,
                    **owners(measured),
                    "predicted GiB": predicted.total / GIB,
                    "states off by": worst_deviation(predicted, measured),
                    "predicted": to_json(predicted),
                    "measured": measured,
                }
            )
            release(engine)
    torch.distributed.destroy_process_group()
    return rows


def _gather_own_object(gathered: list[Any], mine: Any) -> None:
    """Fill ``gathered`` with this rank's object, because the fake group gathers nothing."""
    gathered[:] = [mine] * len(gathered)


def config_of(model: Mapping[str, Any], zero: Mapping[str, Any], micro: int, world: int) -> Config:
    """Return the config of a run with one micro-batch per step."""
    return validate(
        {
            "run": {"name": "zero_stages", "output_dir": "-"},
            "model": dict(model),
            "data": {"train": "-", "val": "-"},
            "train": {
                "duration": "1 epoch",
                "global_batch_size": micro * world,
                "micro_batch_size": micro,
            },
            "deepspeed": {"zero_optimization": dict(zero)},
            "convergence": {"tau": 1.0, "zeta": 5.0},  # selects PreLoRA's phases
        },
        "zero_stages.py",
    )


def plans(layout: Layout) -> tuple[Plan, Plan, Plan]:
    """Return the plans of the full, warm-up and LoRA phases."""
    warmup = warmup_plan(layout, ranks_in_turn(layout))
    return (full_plan(layout), warmup, lora_plan(layout, warmup))


def owners(measured: Mapping[str, int]) -> dict[str, float]:
    """Return the GiB by owner, as columns of the table."""
    return {owner: measured[owner] / GIB for owner in OWNERS}


def peak_bytes() -> int:
    """Return the peak bytes of the device in this phase, or without one of resident memory so far."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss_bytes()


def bytes_after_backward(
    engine: Engine, layout: Layout, world: int, *, size: int
) -> tuple[Any, dict[str, int]]:
    """Take a step with micro-batches of ``size`` images; return predicted and measured bytes after its backward."""
    m = engine.config.model
    images = torch.randint(0, 256, (size, m.num_channels, m.image_size, m.image_size), dtype=torch.uint8)
    batch = MicroBatch(images, torch.randint(0, engine.num_labels, (size,)))
    engine.backward([batch] * engine.accumulation)
    measured = wait_until(
        lambda: census(engine), lambda count: count["other"] <= 0.02 * sum(count.values())
    )
    engine.finish_step(lr=1e-6)
    predicted = predict_bytes(
        engine.plan,
        layout,
        engine.config.zero,
        world,
        after_backward=True,
        kernel=engine.config.kernel(),
    )
    return predicted, measured


def step(engine: Engine, loader: TrainLoader) -> dict[str, float]:
    """Take a step; return its seconds by part, and the bytes that its collectives carried."""
    begun = time.perf_counter()
    batch = loader.next()
    data = time.perf_counter() - begun
    with Clock(engine.ds) as clock:
        engine.train_step(batch, lr=1e-6)
        synchronize()
    return {"data": data, "step": time.perf_counter() - begun, **clock.parts()}


class Clock:
    """A context that times DeepSpeed's forward, backward and step and the collectives in each.

    It also counts the bytes that the collectives carry.
    """

    def __init__(self, ds: Any) -> None:
        from deepspeed.comm import comm

        self._seconds = Counter[str]()
        self._inside = Counter[str]()  # part -> seconds of the collectives in it
        self._part = ""
        self._places = [
            (ds, "forward", "forward"),
            (ds, "backward", "backward"),
            (ds, "step", "optimizer"),
            *((comm.cdb, name, "communication") for name in SENT),
        ]

    def __enter__(self) -> Clock:
        for holder, name, part in self._places:
            setattr(holder, name, self._timed(getattr(holder, name), part))
        return self

    def __exit__(self, *_: object) -> None:
        for holder, name, _part in self._places:
            delattr(holder, name)  # uncovers the method of the class

    def _timed(self, function: Any, part: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if part == "communication":
                tensors = [a for a in (*args, *options.values()) if isinstance(a, torch.Tensor)]
                self._seconds["bytes"] += max(t.nbytes for t in tensors)
            else:
                self._part = part
            synchronize()
            begun = time.perf_counter()
            result = function(*args, **options)
            if part == "communication" and hasattr(result, "wait"):
                result.wait()
            synchronize()
            spent = time.perf_counter() - begun
            self._seconds[part] += spent
            if part == "communication":
                self._inside[self._part] += spent
            return result

        return call

    def parts(self) -> dict[str, float]:
        """Return the seconds by part, the others without communication, and ``bytes``."""
        without_communication = {
            part: self._seconds[part] - self._inside[part]
            for part in ("forward", "backward", "optimizer")
        }
        return {
            **without_communication,
            "communication": self._seconds["communication"],
            "bytes": self._seconds["bytes"],
        }
