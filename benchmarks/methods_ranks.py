"""The rank functions of methods.py: steps with some adapters active, re-selections and merges."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from lora_step import ranks_in_turn
from support.plans import full_plan, lora_plan, warmup_plan
from switch_ranks import copy_bytes_per_second, elements, new_engine, one_step

from prelora_ds.core.adapters import KINDS
from prelora_ds.core.allocators import select
from prelora_ds.core.layout import Layout
from prelora_ds.core.merge import PROBES, Reset
from prelora_ds.core.phases import Adapters, PhaseSpec, plan_of
from prelora_ds.core.plan import Plan
from prelora_ds.core.quantised import BF16
from prelora_ds.core.rank_rules.uniform import UniformRank
from prelora_ds.core.selection import candidates, with_active
from prelora_ds.cost.flops import micro_batch
from prelora_ds.engine import merge as merge_module
from prelora_ds.engine.census import census, peak_rss_bytes, wait_until
from prelora_ds.engine.engine import Engine
from prelora_ds.engine.fp32_base import on_fp32_base
from prelora_ds.engine.merge import merge_adapters
from prelora_ds.engine.state import EngineState
from prelora_ds.engine.transition import transition

STAGE = 2
MERGED_RANK = 256
FULL = "full"  # in the place of a kind of adapter: full training
RESETS = {"zero": Reset(), "magnitude": Reset("magnitude", 0.75)}
# Part of a merge -> the function of engine/merge.py that does it.
PARTS = {
    "gather the adapters": "_full_master",
    "multiply and add": "add_product",
    "write the weights": "_write_slice",
    "begin again": "_restart_adapters",
    "outputs before and after": "_logits_of_probes",
}


# The rank of a kind that has the same one for all linears; the others have the mean rank 30.
RANK_FOR_ALL = {"vera": 64, "oft": 32, "miss": 32}


@dataclass(frozen=True)
class Variant:
    """Which adapters train in a step.

    share: how many of all adapters train.
    bottom_frozen: whether they are those of the last blocks, and nothing below them trains; otherwise they are drawn
        at random.
    importance: whether the importance of all adapters is measured.
    """

    share: float
    bottom_frozen: bool = False
    importance: bool = False


def lora(layout: Layout) -> Plan:
    """Return the plan of a LoRA phase of mean rank 30 that trains head, norms and embeddings as well."""
    return lora_plan(layout, warmup_plan(layout, ranks_in_turn(layout)))


def steps_of_variants(pipe: Connection, model: Mapping[str, Any], micro: int) -> None:
    """Take steps as the script asks, until it sends None.

    A message is (variant, seed of the choice, number of steps). The adapters are chosen before the steps. The
    answer has the seconds of the steps, and the FLOPs and the bytes of activations of one micro-batch.
    """
    engine = new_engine(model, micro, STAGE, lora)
    while (message := pipe.recv()) is not None:
        variant, seed, steps = message
        engine.set_active(choose(engine, variant, seed).training())
        engine.measure("forward" if variant.importance else None)
        seconds = [one_step(engine) for _ in range(steps)]
        cost = micro_batch(
            engine.config.model, engine.plan, engine.layout, micro, kernel=engine.config.kernel()
        )
        pipe.send({"seconds": seconds, "flops": cost.flops, "saved": cost.saved_bytes})


def steps_of_kinds(pipe: Connection, model: Mapping[str, Any], micro: int) -> None:
    """Take a step with each kind of adapter that the script names, until it sends None.

    A message is a kind, or FULL for a step of full training. The answer has the seconds of the second step, the bytes
    that the engine owns after it by the census, the FLOPs of one micro-batch, and how many parameters train.
    """
    engine = new_engine(model, micro, STAGE, full_plan)
    while (kind := pipe.recv()) is not None:
        engine, _ = transition(engine, full_plan(engine.layout), edit=drop_adapters(engine.layout))
        if kind != FULL:
            engine, _ = transition(engine, plan_with(kind, engine.layout))
        one_step(engine)  # the first step creates the moments
        seconds = one_step(engine)
        owned = wait_until(lambda live=engine: census(live), lambda found: found["other"] == 0)  # type: ignore[misc]
        cost = micro_batch(engine.config.model, engine.plan, engine.layout, micro, kernel="branch")
        pipe.send({"seconds": seconds, "bytes": sum(owned.values()) - owned["other"] - owned["host"],
                   "flops": cost.flops, "trains": elements(engine.plan, engine.layout)})


def drop_adapters(layout: Layout) -> Callable[[EngineState, Plan, Plan], None]:
    """Return an edit that removes all adapters from a state without merging them."""

    def edit(state: EngineState, before: Plan, after: Plan) -> None:
        for name in before.leaves(layout):
            state.slices.pop(name, None)
            state.adam_steps.pop(name, None)

    return edit


def plan_with(kind: str, layout: Layout) -> Plan:
    """Return the plan of a phase in which adapters of ``kind``, head, norms and embeddings train."""
    uniform = {family: dict.fromkeys(layers, RANK_FOR_ALL.get(kind, 1)) for family, layers in layout.targets.items()}
    ranks = ranks_in_turn(layout) if KINDS[kind].can.rank_per_module else uniform
    adapters = Adapters(kind, tuple(layout.targets), UniformRank(1))  # `ranks` are given instead of the rule
    return plan_of(PhaseSpec("lora", adapters, ("adapters", "rest")), layout, seed=0, ranks=ranks)


def steps_on_bases(pipe: Connection, model: Mapping[str, Any], micro: int, dtype: str) -> None:
    """Take a step for each message, until it is None, on weights in ``dtype`` (the message) or on BF16 ones ("bf16").

    One engine takes both steps, so that they differ in nothing but the weights below the adapters.
    """
    engine = new_engine(model, micro, STAGE, lambda layout: replace(lora(layout), base_dtype=dtype))
    while (message := pipe.recv()) is not None:
        with on_fp32_base(engine) if message == BF16 else contextlib.nullcontext():
            pipe.send(one_step(engine))


def choose(engine: Engine, variant: Variant, seed: int) -> Plan:
    """Return the plan of ``engine`` with the adapters of ``variant`` active."""
    plan, layout = engine.plan, engine.layout
    layer_of = {path: layer for of_family in layout.targets.values() for layer, path in of_family.items()}
    among = candidates(plan, layout)
    if variant.bottom_frozen:
        chosen = select("top_k", {path: layer_of[path] for path in among}, share=variant.share,
                        rng=random.Random(seed))
    else:
        chosen = select("random", dict.fromkeys(among, 1.0), share=variant.share, rng=random.Random(seed))
    return with_active(plan, layout, chosen, cut_backward=variant.bottom_frozen)


def reselections(
    pipe: Connection, model: Mapping[str, Any], micro: int, steps: int, choices: int
) -> dict[str, Any]:
    """Time ``steps`` LoRA steps, and ``choices`` re-selections of two thirds of the adapters."""
    engine = new_engine(model, micro, STAGE, lora)
    one_step(engine)  # the first step creates the moments
    report: dict[str, Any] = {"steps": [one_step(engine) for _ in range(steps)], "reselections": []}
    for seed in range(choices):
        names = choose(engine, Variant(2 / 3), seed).training()
        torch.distributed.barrier()
        begun = time.perf_counter()
        engine.set_active(names)
        report["reselections"].append(time.perf_counter() - begun)
    return report | {"adapters": len(engine.plan.adapters)}


def merges(
    pipe: Connection, model: Mapping[str, Any], micro: int, steps: int, times: int
) -> dict[str, Any]:
    """Time ``steps`` full steps, and then ``times`` merges with each rule of RESETS by part.

    Returns the seconds, and the least seconds that each part could take.
    """
    engine = new_engine(model, micro, STAGE, full_plan)
    one_step(engine)  # the first step creates the moments
    report: dict[str, Any] = {"steps": [one_step(engine) for _ in range(steps)]}
    report["peak_rss"] = peak_rss_bytes()

    engine, _ = transition(engine, rank_256(engine.layout), parked=adapted(engine.layout))
    report |= {"limits": limits(engine), "merges": []}
    for i in range(times * len(RESETS)):
        one_step(engine, images_per_rank=1)  # B is zero after a merge, and the moments may be
        rule = list(RESETS)[i % len(RESETS)]
        torch.distributed.barrier()
        with clocked_parts() as parts:
            begun = time.perf_counter()
            done = merge_adapters(engine, replace(engine.plan, cycle=engine.plan.cycle + 1), RESETS[rule])
            seconds = time.perf_counter() - begun
        report["merges"].append(
            {"rule": rule, "seconds": seconds, "parts": parts, "output change": done.output_change}
        )
    return report


def rank_256(layout: Layout) -> Plan:
    """Return the plan of a LoRA phase in which every adapter has the rank MERGED_RANK."""
    ranks = {family: dict.fromkeys(layers, MERGED_RANK) for family, layers in layout.targets.items()}
    return lora_plan(layout, warmup_plan(layout, ranks))


def adapted(layout: Layout) -> frozenset[str]:
    """Return the weights that have an adapter."""
    return frozenset(f"{path}.weight" for path in layout.modules())


@contextlib.contextmanager
def clocked_parts() -> Iterator[dict[str, float]]:
    """Time the parts of the merges in the context, and yield the seconds of each part."""
    seconds = dict.fromkeys(PARTS, 0.0)

    def clocked(part: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        result = function(*args, **options)
        seconds[part] += time.perf_counter() - begun
        return result

    with contextlib.ExitStack() as stack:
        for part, name in PARTS.items():
            timed = partial(clocked, part, getattr(merge_module, name))
            stack.enter_context(patch.object(merge_module, name, timed))
        yield seconds


def limits(engine: Engine) -> dict[str, float]:
    """Return the least seconds that this rank needs for each part of a merge.

    They are the bytes that the part must write at the speed of a memory copy, or the FLOPs of its products at the
    speed of a large product of the same type.
    """
    layout, model = engine.layout, engine.config.model
    world = torch.distributed.get_world_size()
    shapes = engine.plan.parameters(layout)
    weights = sum(torch.Size(shapes[name]).numel() for name in adapted(layout))
    adapters = elements(engine.plan, layout) - elements(
        replace(engine.plan, trainable=engine.plan.trainable - engine.plan.leaves(layout).keys()), layout
    )
    copied = copy_bytes_per_second()
    probes = 2 * micro_batch(model, engine.plan, layout, PROBES, kernel=engine.config.kernel()).forward_flops
    return {
        "gather the adapters": 4 * adapters / copied,
        "multiply and add": 2 * MERGED_RANK * weights / world / product_rate(torch.float64),
        "write the weights": 2 * weights / copied,
        "begin again": (2 + 12 / world) * adapters / copied,
        "outputs before and after": probes / product_rate(torch.bfloat16),
    }


def product_rate(dtype: torch.dtype, side: int = 1024) -> float:
    """Return the FLOP/s of a large product on this rank while all ranks compute, as in a forward pass."""
    x = torch.ones(side, side, dtype=dtype)
    torch.distributed.barrier()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        torch.nn.functional.linear(x, x)
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / median(seconds)
