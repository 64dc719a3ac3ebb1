"""A short calibration on this machine: real steps of a few blocks, and from them the rates of `cost.timing`.

The engine, the blocks and the phases are those of training; the model has fewer blocks.
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

from prelora_ds.config.load import validate
from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import plans_at_rank
from prelora_ds.core.plan import Plan
from prelora_ds.cost.timing import KINDS, SHARED, Rates, Work, step_work
from prelora_ds.data.parallel import end_with_parent
from prelora_ds.errors import ConfigError

LABELS = 1000
PAYLOADS = (2**18, 2**23)  # fp32 elements of the all-reduces that give latency and bandwidth
ROUNDS, STEPS = 3, 4  # a machine drifts: all cases take their turn in each round


@dataclass(frozen=True)
class Case:
    """One step to be timed: a phase, images a micro-batch, LoRA's rank, blocks, micro-batches a step."""

    phase: str
    micro_batch_size: int
    lora_rank: int
    layers: int = 2
    accum: int = 1


def calibration_cases(config: Config) -> list[Case]:
    """What tells the kinds of work apart: two batches, two ranks, with and without gradients of weights."""
    m, low, high = config.train.micro_batch_size, config.lora.r_min, config.lora.r_max
    if m < 2:
        raise ConfigError("train.micro_batch_size", m, "a calibration compares this micro-batch with half of it",
                          "set it to 2 or more")
    cases = [Case("full", m, low), Case("full", m // 2, low), Case("warmup", m, low),
             Case("warmup", m // 2, high), Case("lora", m, low),
             Case("lora", m // 2, low), Case("lora", m, high)]
    return [*cases, Case("full", m // 2, low, accum=2)] if config.zero.stage else cases


def calibrate(config: Config, ranks: int) -> dict[str, Any]:
    """Rates of this machine with ``ranks`` ranks on it, and the samples they were fitted to, as JSON."""
    from prelora_ds.engine.runtime import rank_memory_gib

    cases = calibration_cases(config)
    alone = measure(config, cases, 1, local_size=ranks)
    together = measure(config, cases[:1], ranks, local_size=ranks, reduces=True) if ranks > 1 else []
    rates = fit_rates(config, ranks, alone, together)
    rows = [{**asdict(case), "measured_s": s, "fitted_s": rates.step_seconds(case_work(config, case, 1))}
            for case, s in zip(cases, alone, strict=True)]
    return {"rates": asdict(rates), "memory_gib": rank_memory_gib(ranks), "samples": rows}


def fit_rates(config: Config, ranks: int, alone: Sequence[float], together: Sequence[float]) -> Rates:
    """Rates from seconds. ``alone``: of `calibration_cases` on one rank, which give the kinds of a rank's own work.
    ``together``: of the first of them and of the all-reduces on all ranks of the host, which give the network and what
    ranks take from each other (empty for one rank)."""
    cases = calibration_cases(config)
    seconds = fit([(case_work(config, case, 1), s) for case, s in zip(cases, alone, strict=True)])
    sharing = 1.0
    if ranks > 1:
        network = [(Work(wire_gb=8 * size * (ranks - 1) / ranks / 1e9, hops=math.ceil(math.log2(ranks)) / 1e3), s)
                   for size, s in zip(PAYLOADS, together[1:], strict=True)]
        seconds |= {kind: cost for kind, cost in fit(network).items() if kind in SHARED}
        work = case_work(config, cases[0], ranks)
        shared = sum(seconds[kind] * getattr(work, kind) for kind in SHARED)
        own = Rates(seconds, "", measured=True).step_seconds(replace(work, wire_gb=0.0, hops=0.0))
        sharing = max(1.0, (together[0] - shared) / own)
    source = f"calibration of {len(cases)} cases with {ranks} ranks a host on {platform.node() or 'this machine'}"
    return Rates(seconds, source, measured=True, sharing=sharing)


def fit(samples: Sequence[tuple[Work, float]]) -> dict[str, float]:
    """Seconds for a unit of each kind of work: least squares of the relative error with no negative cost.

    The optimum has some costs at zero and is plain least squares on the others, so all such sets are tried.
    """
    rows = np.array([[getattr(work, kind) / seconds for kind in KINDS] for work, seconds in samples])
    used = [i for i in range(len(KINDS)) if rows[:, i].any()]
    best, least = np.zeros(len(KINDS)), np.inf
    for count in range(1, len(used) + 1):
        for chosen in map(list, combinations(used, count)):
            costs, *_ = np.linalg.lstsq(rows[:, chosen], np.ones(len(rows)), rcond=None)
            error = float(((rows[:, chosen] @ costs - 1) ** 2).sum())
            if (costs >= 0).all() and error < least:
                least, best = error, np.zeros(len(KINDS))
                best[chosen] = costs
    return dict(zip(KINDS, best.tolist(), strict=True))


def case_config(config: Config, case: Case, world_size: int) -> Config:
    """The config of a case: the recipe's model with the case's blocks and batch."""
    values = config.model_dump(mode="json")
    values["model"]["num_hidden_layers"] = case.layers
    values["phases"], values["convergence"] = {"preset": "prelora"}, {"tau": 1.0, "zeta": 1.0}
    values["data"] |= {"augment": "none", "mixup": None, "cutmix": 0.0}  # pairs would refuse a case's odd micro-batch
    values["train"] |= {"micro_batch_size": case.micro_batch_size,
                        "global_batch_size": case.micro_batch_size * case.accum * world_size}
    return validate(values, "calibration")


def case_plan(config: Config, case: Case, layout: Layout) -> Plan:
    """The plan of a case, with one rank for all adapters."""
    plans = plans_at_rank(config.specs(), layout, case.lora_rank)
    return next(plan for plan in plans if plan.phase == case.phase)


def case_work(config: Config, case: Case, world_size: int) -> Work:
    """The work of one of ``world_size`` ranks in a step of ``case``."""
    import torch

    from prelora_ds.model.families import find_layout
    from prelora_ds.model.vit import build_model

    own = case_config(config, case, world_size)
    with torch.device("meta"):
        layout = find_layout(build_model(own.model, LABELS), own.families())
    kernel = own.for_phase(case.phase).kernel()
    return step_work(own.model, case_plan(own, case, layout), layout, own.zero, world_size=world_size,
                     micro_batch_size=case.micro_batch_size, accum=case.accum, kernel=kernel)


def measure(config: Config, cases: Sequence[Case], ranks: int, *, local_size: int,
            reduces: bool = False) -> list[float]:
    """Median seconds of a step of each case on ``ranks`` ranks of this host, and with ``reduces`` of the all-reduces.

    ``local_size`` is the number of ranks that the cores are shared out to. Raises RuntimeError when a rank dies.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    receiver, sender = context.Pipe(duplex=False)
    processes = [context.Process(target=_rank, args=(sender if rank == 0 else None, rank, ranks, local_size, port,
                                                     config, list(cases), reduces)) for rank in range(ranks)]
    for process in processes:
        process.start()
    sender.close()
    try:
        return list(receiver.recv())
    except EOFError as exc:
        raise RuntimeError("a rank of the calibration ended with an error (above)") from exc
    finally:
        for process in processes:
            process.join()


def _rank(sender: Any, rank: int, world_size: int, local_size: int, port: int, config: Config, cases: list[Case],
          reduces: bool) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                   "LOCAL_SIZE": str(local_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    end_with_parent()
    from prelora_ds.engine.runtime import choose_accelerator, init_process_group

    choose_accelerator()
    init_process_group()
    rounds = [[*(_steps(config, case, rank, world_size) for case in cases),
               *(_all_reduces(size) for size in PAYLOADS if reduces)] for _ in range(ROUNDS)]
    if sender is not None:
        sender.send([median(chain(*times)) for times in zip(*rounds, strict=True)])


def _steps(config: Config, case: Case, rank: int, world_size: int) -> list[float]:
    import torch

    from prelora_ds.data.batch import MicroBatch
    from prelora_ds.engine.build import build_engine
    from prelora_ds.engine.release import release
    from prelora_ds.engine.state import initial_state
    from prelora_ds.model.families import find_layout
    from prelora_ds.model.vit import build_model

    own = case_config(config, case, world_size)
    torch.manual_seed(0)
    module = build_model(own.model, LABELS)
    layout = find_layout(module, own.families())
    engine = build_engine(own, case_plan(own, case, layout), layout, LABELS, initial_state(module, rank, world_size))
    m, size = own.model, case.micro_batch_size
    images = torch.randint(0, 256, (size, m.num_channels, m.image_size, m.image_size), dtype=torch.uint8)
    batches = [MicroBatch(images, torch.randint(0, LABELS, (size,)))] * case.accum
    seconds = _seconds(lambda: engine.train_step(batches, lr=1e-5))
    release(engine)
    return seconds


def _all_reduces(size: int) -> list[float]:
    import torch
    import torch.distributed as dist

    from prelora_ds.engine.runtime import device

    payload = torch.zeros(size, device=device())
    return _seconds(lambda: dist.all_reduce(payload))


def _seconds(run: Callable[[], object]) -> list[float]:
    from prelora_ds.engine.runtime import synchronize

    times = []
    for _ in range(STEPS + 2):  # the first two warm up
        synchronize()
        begun = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - begun)
    return times[2:]
