"""The part of gpu.py that runs in each rank."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lora_step import ranks_in_turn
from support.plans import full_plan, lora_plan, warmup_plan
from torch import nn

from prelora_ds.accelerator import accelerator_name, driver_version, gpu_total_gib
from prelora_ds.config.adapters import FAMILIES
from prelora_ds.config.load import validate
from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.cost.candidates import predict_candidate
from prelora_ds.cost.flops import micro_batch
from prelora_ds.cost.timing import GPUS, data_sheet_rates, gpu_named
from prelora_ds.data.batch import MicroBatch
from prelora_ds.engine.build import build_engine
from prelora_ds.engine.engine import Engine
from prelora_ds.engine.release import release
from prelora_ds.engine.runtime import device, freeze_imports, local_world_size, rank_memory_gib, synchronize
from prelora_ds.engine.state import initial_state
from prelora_ds.model.families import find_layout
from prelora_ds.model.vit import build_model

if TYPE_CHECKING:
    from gpu import Case

LABELS = 1000
MIB = 2**20
MESSAGES_MIB = (4, 64, 256)
LONGEST = 5  # kernels that are listed


def measure(pipe: Connection | None, options: Mapping[str, Any], listed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Measure all cases, and what the machine can do. Collective; each rank returns its own numbers."""
    from gpu import LARGEST_MICRO_BATCH, Case  # which imports this module in the process of the script

    begun = time.monotonic()
    cases = [Case(**case) for case in listed]
    tiny = options["tiny"]
    world = dist.get_world_size()
    warm_up, steps = (1, 2) if tiny else (3, 10)
    micro = fitting_micro_batch(options["model"], cases, world, 4 if tiny else LARGEST_MICRO_BATCH)
    facts = facts_of_the_machine(options["model"], micro, tiny=tiny)
    freeze_imports()
    torch.manual_seed(0)
    # Its first values take seconds: they are the same for all cases.
    module = build_model(config_of(options["model"], cases[0], micro, world).model, LABELS)

    timed: dict[Case, list[dict[str, float]]] = {}
    profiles: dict[Case, dict[str, Any]] = {}
    for order in (cases, cases[::-1]):
        for case in order:
            if timed.get(case) and (tiny or not _in_time(begun, options["seconds"])):
                continue
            if not timed.get(case) and timed and not _in_time(begun, options["seconds"]):
                continue
            with engine_of(module, config_of(options["model"], case, micro, world), case.phase) as engine:
                batches = random_batches(engine.config)
                for _ in range(warm_up):
                    engine.train_step(batches, lr=1e-6)
                timed.setdefault(case, []).extend(timed_step(engine, batches) for _ in range(steps))
                if case not in profiles:
                    profiles[case] = profile_of_a_step(engine, batches)

    done = [case for case in cases if case in timed]
    rows = [row_of(case, timed[case], profiles[case], options["model"], micro, world) for case in done]
    longest = {case.name: profiles[case]["longest"] for case in done if case in (Case("full", 2), Case("lora", 2))}
    return {"rows": rows, "facts": facts, "longest": longest,
            "left out": [case.name for case in cases if case not in timed]}


def _in_time(begun: float, seconds: float) -> bool:
    """Whether there is time for another case. All ranks come to rank 0's answer."""
    answer = [time.monotonic() - begun < seconds]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def config_of(model: Mapping[str, Any], case: Case, micro: int, world: int) -> Config:
    """Return the config of a run with one micro-batch per step."""
    zero = {"stage": case.stage, "overlap_comm": case.overlap}
    return validate({
        "run": {"name": "gpu", "output_dir": "-"},
        "model": {**model, "compile": case.compiled},
        "data": {"train": "-", "val": "-"},
        "train": {"duration": "1 epoch", "global_batch_size": micro * world, "micro_batch_size": micro,
                  "reduce_dtype": case.reduce},
        "deepspeed": {"zero_optimization": zero},
        "convergence": {"tau": 1.0, "zeta": 5.0},  # selects PreLoRA's phases
        "lora": {"mode": case.mode},
    }, "gpu.py")


def plan_of_phase(layout: Layout, phase: str) -> Plan:
    """Return the plan of a phase; adapters have rank 8, 16, 32 and 64 in turn."""
    warmup = warmup_plan(layout, ranks_in_turn(layout))
    return {"full": full_plan(layout), "warmup": warmup, "lora": lora_plan(layout, warmup)}[phase]


def layout_of(config: Config) -> Layout:
    with torch.device("meta"):
        return find_layout(build_model(config.model, LABELS), FAMILIES)


def fitting_micro_batch(model: Mapping[str, Any], cases: Sequence[Case], world: int, largest: int) -> int:
    """Return the largest micro-batch, of ``largest`` and its halves, that all cases are predicted to fit with."""
    memory_gib = rank_memory_gib(local_world_size())
    micro = largest
    while micro > 1 and not all(candidate(model, case, micro, world).fits(memory_gib) for case in cases):
        micro //= 2
    sizes: list[Any] = [None] * world
    dist.all_gather_object(sizes, micro)
    return int(min(sizes))


def candidate(model: Mapping[str, Any], case: Case, micro: int, world: int) -> Any:
    """Return what is predicted for ``case``."""
    config = config_of(model, case, micro, world).for_phase(case.phase)
    layout = layout_of(config)
    return predict_candidate(config, plan_of_phase(layout, case.phase), layout, config.zero, world, micro)


@contextmanager
def engine_of(module: nn.Module, config: Config, phase: str) -> Iterator[Engine]:
    """Yield an engine in ``phase`` with the weights of ``module``, and release it."""
    layout = find_layout(module, FAMILIES)
    state = initial_state(module, dist.get_rank(), dist.get_world_size())
    engine = build_engine(config, plan_of_phase(layout, phase), layout, LABELS, state)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield engine
    release(engine)


def random_batches(config: Config) -> list[MicroBatch]:
    model = config.model
    size = config.train.micro_batch_size
    images = torch.randint(0, 256, (size, model.num_channels, model.image_size, model.image_size), dtype=torch.uint8)
    labels = torch.randint(0, LABELS, (size,))
    if torch.cuda.is_available():
        images, labels = images.pin_memory(), labels.pin_memory()
    return [MicroBatch(images, labels)]


def timed_step(engine: Engine, batches: Sequence[MicroBatch]) -> dict[str, float]:
    """Take a step, and return the milliseconds of it and its parts.

    enqueue: what the host takes to queue forward and backward passes. backward: until the device has done them.
    """
    synchronize()
    begun = time.perf_counter()
    engine.backward(batches)
    enqueued = time.perf_counter()
    synchronize()
    computed = time.perf_counter()
    engine.finish_step(lr=1e-6)
    synchronize()
    ended = time.perf_counter()
    return {"step": 1e3 * (ended - begun), "enqueue": 1e3 * (enqueued - begun), "backward": 1e3 * (computed - begun),
            "update": 1e3 * (ended - computed)}


def profile_of_a_step(engine: Engine, batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """Return what torch's profiler and its warnings say of one step; on a CPU operators stand for kernels."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    peak = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if on_gpu else (0, 0)
    waits = count_waits(lambda: engine.train_step(batches, lr=1e-6)) if on_gpu else None
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        engine.train_step(batches, lr=1e-6)
        synchronize()
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    spans = [(event.name, event.time_range.start, event.time_range.end)
             for event in profiled.events() if event.device_type == wanted]
    nccl = [(start, end) for name, start, end in spans if "nccl" in name.lower()]
    others = [(start, end) for name, start, end in spans if "nccl" not in name.lower()]
    total = Counter[str]()
    for name, start, end in spans:
        total[name] += end - start
    return {"kernels": len(spans), "waits": waits, "nccl ms": union(nccl) / 1e3,
            "exposed nccl ms": (union([*nccl, *others]) - union(others)) / 1e3, "peak": peak,
            "longest": [{"kernel": name[:90], "ms": us / 1e3} for name, us in total.most_common(LONGEST)]}


def union(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of ``spans`` of (start, end)."""
    length = 0.0
    reached = float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def count_waits(act: Callable[[], object]) -> int:
    """Return how often the host waits for the device in ``act``, where torch can see it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            act()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in warned)


def row_of(case: Case, timed: Sequence[Mapping[str, float]], profiled: Mapping[str, Any], model: Mapping[str, Any],
           micro: int, world: int) -> dict[str, Any]:
    """Return the row of a case."""
    ms = {part: median(step[part] for step in timed) for part in timed[0]}
    config = config_of(model, case, micro, world).for_phase(case.phase)
    layout = layout_of(config)
    flops = micro_batch(config.model, plan_of_phase(layout, case.phase), layout, micro, kernel=config.kernel()).flops
    tflop_s = flops / ms["step"] / 1e9
    gpu = gpu_named(accelerator_name(), gpu_total_gib() or 0.0)
    predicted = candidate(model, case, micro, world)
    allocated, reserved = profiled["peak"]
    row = {
        "what": case.name, "step ms": ms["step"], "img/s": world * micro / ms["step"] * 1e3, "TFLOP/s a rank": tflop_s,
        "of peak": tflop_s / GPUS[gpu].bf16_tflops if gpu else None,
        "enqueue / backward": ms["enqueue"] / ms["backward"], "update ms": ms["update"],
        "kernels": profiled["kernels"], "waits": profiled["waits"], "nccl ms": profiled["nccl ms"],
        "exposed ms": profiled["exposed nccl ms"], "peak GiB": allocated / 2**30, "reserved GiB": reserved / 2**30,
        "predicted GiB": predicted.peak_bytes / 2**30,
    }
    if gpu:
        rates = data_sheet_rates(gpu, hosts=max(1, world // local_world_size()))
        row["predicted ms"] = 1e3 * rates.step_seconds(predicted.work, local_world_size())
    return row | {"case": vars(case)}


def facts_of_the_machine(model: Mapping[str, Any], micro: int, *, tiny: bool) -> dict[str, Any]:
    """Return names, and the rates of copies, all-reduces and a data worker."""
    size = (1 if tiny else 64) * MIB
    facts: dict[str, Any] = {
        "device": accelerator_name() or "CPU", "ranks": dist.get_world_size(), "driver": driver_version(),
        "CUDA": torch.version.cuda, "ROCm": torch.version.hip, "memory GiB": gpu_total_gib(), "micro_batch": micro,
    }
    if torch.cuda.is_available():
        version = torch.cuda.nccl.version()
        facts["NCCL"] = ".".join(map(str, version)) if isinstance(version, tuple) else str(version)
    for kind in ("pageable", "pinned"):
        if kind == "pinned" and not torch.cuda.is_available():
            continue
        source = torch.empty(size, dtype=torch.uint8, pin_memory=kind == "pinned")
        facts[f"{kind} to device GB/s"] = size / best_seconds(
            lambda source=source: source.to(device(), copy=True)) / 1e9
    world = dist.get_world_size()
    for mib in MESSAGES_MIB[:1] if tiny else MESSAGES_MIB:
        payload = torch.zeros(mib * MIB // 4, device=device())
        moved = 2 * payload.nbytes * (world - 1) / world
        seconds = best_seconds(lambda payload=payload: dist.all_reduce(payload))
        facts[f"all-reduce {mib} MiB GB/s"] = moved / seconds / 1e9 if world > 1 else None
    facts["images/s of a data worker"] = images_per_s_of_a_worker(model, 2 if tiny else 16)
    return facts


def best_seconds(act: Callable[[], object], rounds: int = 5) -> float:
    """Return the seconds of the fastest call of ``act``, after one to warm up."""
    act()
    seconds = []
    for _ in range(rounds):
        synchronize()
        begun = time.perf_counter()
        act()
        synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def images_per_s_of_a_worker(model: Mapping[str, Any], photographs: int) -> float | None:
    """Return the images per second that one process reads, decodes and crops; on rank 0 only."""
    from prelora_ds.data.manifest import Manifest
    from prelora_ds.data.setup import decode_rate
    from prelora_ds.data.shards import writer

    if dist.get_rank():
        return None
    with tempfile.TemporaryDirectory() as folder:
        train = Path(folder) / "train"
        writer.write_shards(writer.photographs(photographs), train, samples_per_shard=photographs,
                            class_names=writer.PHOTOGRAPH_CLASSES)
        from gpu import Case

        config = config_of(model, Case("full", 2), 1, 1)
        config = config.model_copy(update={"data": config.data.model_copy(update={"train": str(train)})})
        return decode_rate(config, Manifest.load(train))
