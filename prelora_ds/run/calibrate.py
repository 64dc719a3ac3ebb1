"""Calibrate this machine: time steps of a few blocks, and fit the rates of `cost.timing`.

The engine, the blocks and the phases are those of training, but the model has fewer blocks.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, combinations
from statistics import median
from typing import Any

import numpy as np

from prelora_ds.accelerator import accelerator_name
from prelora_ds.config.load import validate
from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import plans_at_rank
from prelora_ds.core.plan import Plan
from prelora_ds.cost.timing import KINDS, SHARED, Rates, Work, step_work
from prelora_ds.data.parallel import end_with_parent
from prelora_ds.errors import ConfigError

LABELS = 1000
# The fp32 elements of the all-reduces from which latency and bandwidth are fitted.
PAYLOADS = (2**18, 2**23)
# Each round runs all cases, because the speed of a machine drifts.
ROUNDS = 3
STEPS = 4  # timed steps per case and round


@dataclass(frozen=True)
class Case:
    """A kind of step to be timed.

    layers: the number of blocks. accum: micro-batches per step.
    """

    phase: str
    micro_batch_size: int
    lora_rank: int
    layers: int = 2
    accum: int = 1


def calibration_cases(config: Config) -> list[Case]:
    """Return cases that separate the kinds of work.

    They have two batch sizes and two LoRA ranks, with and without gradients of the weights. Raises
    ConfigError if the micro-batch cannot be halved.
    """
    micro = config.train.micro_batch_size
    low = config.lora.r_min
    high = config.lora.r_max
    if micro < 2:
        raise ConfigError(
            "train.micro_batch_size",
            micro,
            "a calibration also times half of this micro-batch",
            "set it to 2 or more",
        )
    half = micro // 2
    cases = [
        Case("full", micro, low),
        Case("full", half, low),
        Case("warmup", micro, low),
        Case("warmup", half, high),
        Case("lora", micro, low),
        Case("lora", half, low),
        Case("lora", micro, high),
    ]
    if config.zero.stage:  # Stage 0 does not accumulate gradients.
        cases.append(Case("full", half, low, accum=2))
    return cases


def calibrate(config: Config, ranks: int) -> dict[str, Any]:
    """Measure the rates of this machine with ``ranks`` ranks on it.

    Returns JSON with the rates and the samples to which they were fitted.
    """
    from prelora_ds.accelerator import choose_accelerator

    choose_accelerator()
    from prelora_ds.engine.runtime import rank_memory_gib

    cases = calibration_cases(config)
    alone = measure(config, cases, 1, local_size=ranks)
    together = []
    if ranks > 1:
        together = measure(config, cases[:1], ranks, local_size=ranks, reduces=True)
    rates = fit_rates(config, ranks, alone, together)
    samples = [
        {
            **asdict(case),
            "measured_s": seconds,
            "fitted_s": rates.step_seconds(case_work(config, case, 1)),
        }
        for case, seconds in zip(cases, alone, strict=True)
    ]
    return {"rates": asdict(rates), "memory_gib": rank_memory_gib(ranks), "samples": samples}


def fit_rates(
    config: Config, ranks: int, alone: Sequence[float], together: Sequence[float]
) -> Rates:
    """Fit rates to measured seconds.

    alone: the seconds of each of `calibration_cases` on one rank. They determine the kinds of work
        that are local to a rank.
    together: the seconds of the first case and of the all-reduces on all ranks of the host. They
        determine the network, and how much ranks slow each other down. Empty for one rank.
    """
    cases = calibration_cases(config)
    samples = [(case_work(config, case, 1), s) for case, s in zip(cases, alone, strict=True)]
    seconds = fit(samples)
    sharing = 1.0
    if ranks > 1:
        hops = math.ceil(math.log2(ranks)) / 1e3
        network = [
            (Work(wire_gb=8 * size * (ranks - 1) / ranks / 1e9, hops=hops), s)
            for size, s in zip(PAYLOADS, together[1:], strict=True)
        ]
        seconds |= {kind: cost for kind, cost in fit(network).items() if kind in SHARED}
        work = case_work(config, cases[0], ranks)
        on_network = sum(seconds[kind] * getattr(work, kind) for kind in SHARED)
        local_work = replace(work, wire_gb=0.0, hops=0.0)
        local = Rates(seconds, "", measured=True).step_seconds(local_work)
        sharing = max(1.0, (together[0] - on_network) / local)
    source = (
        f"calibration of {len(cases)} cases with {ranks} ranks per host on "
        f"{platform.node() or 'this machine'}"
    )
    return Rates(seconds, source, measured=True, sharing=sharing, overlaps=accelerator_name() is not None)


def fit(samples: Sequence[tuple[Work, float]]) -> dict[str, float]:
    """Fit the seconds per unit of each kind of work.

    The costs minimise the squared relative error, and none is negative.
    In the optimum some costs are zero and the others solve plain least squares, so all subsets of
    kinds are tried.
    """
    rows = np.array([[getattr(work, kind) / seconds for kind in KINDS] for work, seconds in samples])
    used = [i for i in range(len(KINDS)) if rows[:, i].any()]
    best = np.zeros(len(KINDS))
    least_error = np.inf
    for count in range(1, len(used) + 1):
        for chosen in map(list, combinations(used, count)):
            costs, *_ = np.linalg.lstsq(rows[:, chosen], np.ones(len(rows)), rcond=None)
            error = float(((rows[:, chosen] @ costs - 1) ** 2).sum())
            if (costs >= 0).all() and error < least_error:
                least_error = error
                best = np.zeros(len(KINDS))
                best[chosen] = costs
    return dict(zip(KINDS, best.tolist(), strict=True))


def case_config(config: Config, case: Case, world_size: int) -> Config:
    """Return the config of a case: the recipe's model with the case's blocks and batch."""
    values = config.model_dump(mode="json")
    values["model"]["num_hidden_layers"] = case.layers
    values["phases"] = {"preset": "prelora"}
    values["convergence"] = {"tau": 1.0, "zeta": 1.0}
    # Mixup and CutMix would reject the odd micro-batch of a case.
    values["data"] |= {"augment": "none", "mixup": None, "cutmix": 0.0}
    values["train"] |= {"micro_batch_size": case.micro_batch_size,
                        "global_batch_size": case.micro_batch_size * case.accum * world_size}
    return validate(values, "calibration")


def case_plan(config: Config, case: Case, layout: Layout) -> Plan:
    """Return the plan of a case, with the same LoRA rank for all adapters."""
    plans = plans_at_rank(config.specs(), layout, case.lora_rank)
    return next(plan for plan in plans if plan.phase == case.phase)


def case_work(config: Config, case: Case, world_size: int) -> Work:
    """Return the work of one of ``world_size`` ranks in a step of ``case``."""
    import torch

    from prelora_ds.model.families import find_layout
    from prelora_ds.model.vit import build_model

    config = case_config(config, case, world_size)
    with torch.device("meta"):
        layout = find_layout(build_model(config.model, LABELS), config.families(), config.model.families)
    return step_work(
        config.model,
        case_plan(config, case, layout),
        layout,
        config.zero,
        world_size=world_size,
        micro_batch_size=case.micro_batch_size,
        accum=case.accum,
        kernel=config.for_phase(case.phase).kernel(),
    )


def measure(
    config: Config,
    cases: Sequence[Case],
    ranks: int,
    *,
    local_size: int,
    reduces: bool = False,
) -> list[float]:
    """Measure the median seconds of a step of each case on ``ranks`` ranks of this host.

    local_size: the number of ranks among which the cores are divided.
    reduces: also measure the all-reduces of `PAYLOADS`.

    Raises RuntimeError if a rank dies.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    receiver, sender = context.Pipe(duplex=False)
    processes = []
    for rank in range(ranks):
        rank_sender = sender if rank == 0 else None
        arguments = (rank_sender, rank, ranks, local_size, port, config, list(cases), reduces)
        processes.append(context.Process(target=_run_rank, args=arguments))
    for process in processes:
        process.start()
    sender.close()
    try:
        return list(receiver.recv())
    except EOFError as exc:
        raise RuntimeError("a rank of the calibration failed (see the error above)") from exc
    finally:
        for process in processes:
            process.join()


def _run_rank(
    sender: Any,
    rank: int,
    world_size: int,
    local_size: int,
    port: int,
    config: Config,
    cases: list[Case],
    reduces: bool,
) -> None:
    """Run one rank of `measure`; ``sender`` is None on all ranks but 0."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(local_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    end_with_parent()
    from prelora_ds.accelerator import choose_accelerator

    choose_accelerator()
    from prelora_ds.engine.runtime import init_process_group

    init_process_group()
    rounds = []
    for _ in range(ROUNDS):
        times = [_time_steps(config, case, rank, world_size) for case in cases]
        if reduces:
            times += [_time_all_reduces(size) for size in PAYLOADS]
        rounds.append(times)
    if sender is not None:
        sender.send([median(chain(*times)) for times in zip(*rounds, strict=True)])


def _time_steps(config: Config, case: Case, rank: int, world_size: int) -> list[float]:
    """Time steps of ``case``; returns seconds."""
    import torch

    from prelora_ds.data.batch import MicroBatch
    from prelora_ds.engine.build import build_engine
    from prelora_ds.engine.release import release
    from prelora_ds.engine.state import initial_state
    from prelora_ds.model.families import find_layout
    from prelora_ds.model.vit import build_model

    config = case_config(config, case, world_size)
    torch.manual_seed(0)
    module = build_model(config.model, LABELS)
    layout = find_layout(module, config.families(), config.model.families)
    plan = case_plan(config, case, layout)
    engine = build_engine(config, plan, layout, LABELS, initial_state(module, rank, world_size))
    size = case.micro_batch_size
    shape = (size, config.model.num_channels, config.model.image_size, config.model.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    batches = [MicroBatch(images, torch.randint(0, LABELS, (size,)))] * case.accum
    seconds = _time(lambda: engine.train_step(batches, lr=1e-5))
    release(engine)
    return seconds


def _time_all_reduces(size: int) -> list[float]:
    """Time all-reduces of ``size`` fp32 elements; returns seconds."""
    import torch
    import torch.distributed as dist

    from prelora_ds.engine.runtime import device

    payload = torch.zeros(size, device=device())
    return _time(lambda: dist.all_reduce(payload))


def _time(run: Callable[[], object]) -> list[float]:
    """Time `STEPS` calls of ``run``, after two calls to warm up; returns seconds."""
    from prelora_ds.engine.runtime import synchronize

    times = []
    for _ in range(STEPS + 2):
        synchronize()
        started_at = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - started_at)
    return times[2:]
