"""`auto` in a recipe: settings of single phases, resolved before a run begins, and the number of data workers.

A LoRA phase leaves memory free, and where a stage no longer pays, it can be a cheaper one: a ZeRO-3 run need not gather
its frozen base in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prelora_ds.config.phases import PhaseConfig, PhaseSettings
from prelora_ds.config.tree import Config, ZeroSettings
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import plans_at_rank
from prelora_ds.core.plan import Plan
from prelora_ds.cost.candidates import Candidate, fastest, predict_candidate, predict_candidates
from prelora_ds.cost.forecast import fastest_images_per_s
from prelora_ds.cost.machines import read_calibration
from prelora_ds.cost.timing import Rates, data_sheet_rates, gpu_named
from prelora_ds.data.setup import TrainData, count_workers
from prelora_ds.engine.runtime import accelerator_name, local_world_size, on_rank_0, rank_memory_gib
from prelora_ds.errors import ConfigError
from prelora_ds.hosts.discovery import Ranks


def resolve_auto(config: Config, layout: Layout, ranks: Ranks) -> Config:
    """``config`` with every `auto` replaced; rank 0 prints by what and why.

    Adapters are taken to have the largest rank that their rule gives. Raises ConfigError when nothing fits,
    when the calibration cannot be read, and for a model that is not a ViT, whose costs are not known.
    """
    world_size, ranks_per_host = ranks.world_size, ranks.local_size or 1
    if not any(phase.is_auto for phase in config.phase_list):
        return config
    if config.model.factory is not None:
        raise ConfigError("phases", "auto", "only the costs of the ViT are known",
                          "give micro_batch_size and zero_stage as numbers")
    memory_gib, rates = _machine(config, world_size, ranks_per_host)
    for plan in plans_at_rank(config.specs(), layout):
        own = config.phase(plan.phase)
        if own.is_auto:
            candidates = list(_candidates(config.for_phase(plan.phase), own, plan, layout, world_size))
            fitting = [s for s in candidates if s.fits(memory_gib)]
            if not fitting:
                least = min(candidates, key=lambda s: s.peak_bytes)
                raise ConfigError(f"phases.{plan.phase}", "auto", f"no setting fits {memory_gib:.1f} GiB a rank; the "
                                  f"smallest, ZeRO {least.zero.stage} with a micro-batch of {least.micro_batch_size}, "
                                  f"takes {least.peak_bytes / 2**30:.1f} GiB", "use more ranks, or a higher "
                                  "machine.memory_gib if there is more memory than that")
            chosen = fastest(_largest_of_each_stage(fitting), rates, ranks_per_host)
            config = _with(config, plan.phase, chosen)
            if ranks.rank == 0:
                print(_line(plan.phase, chosen, memory_gib, rates, ranks_per_host), flush=True)
    return config


def workers_of(config: Config, data: TrainData, layout: Layout, say: Callable[[str], None]) -> int:
    """`data.workers`, by rank 0's measurement where it is ``auto``. Collective."""
    if config.data.workers != "auto":
        return config.data.workers

    def measure() -> tuple[int, str]:
        here = local_world_size()
        gpu = gpu_named(accelerator_name(), rank_memory_gib(here))
        fastest = fastest_images_per_s(config, layout, here, torch.distributed.get_world_size(), gpu)
        return count_workers(config, data, ranks_here=here, images_per_s=fastest)

    workers, why = on_rank_0(measure)
    say(why)
    return workers


def _machine(config: Config, world_size: int, ranks_per_host: int) -> tuple[float, Rates | None]:
    """GiB of this rank, and the rates of its device where they are known."""
    memory_gib = rank_memory_gib(ranks_per_host)
    gpu = gpu_named(accelerator_name(), memory_gib)
    rates = data_sheet_rates(gpu, hosts=max(1, world_size // ranks_per_host)) if gpu else None
    if config.machine.calibration is not None:
        rates, _ = read_calibration(Path(config.machine.calibration), "machine.calibration")
    return config.machine.memory_gib or memory_gib, rates


def _candidates(config: Config, own: PhaseConfig, plan: Plan, layout: Layout, world_size: int) -> Iterator[Candidate]:
    for zero in _stages(config, plan) if own.zero_stage == "auto" else [config.zero]:
        if own.micro_batch_size == "auto":
            yield from predict_candidates(config, plan, layout, zero, world_size)
        elif zero.stage or world_size * config.train.micro_batch_size == config.train.global_batch_size:
            yield predict_candidate(config, plan, layout, zero, world_size, config.train.micro_batch_size)


def _stages(config: Config, plan: Plan) -> Iterator[ZeroSettings]:
    """All stages, with offload too where the run has it."""
    for stage in range(4):
        if not (stage == 3 and config.adapters.mode == "merged" and plan.frozen_targets()):
            for offload in {False, config.zero.offload_optimizer and stage >= 2}:
                yield replace(config.zero, stage=stage, offload_optimizer=offload)


def _largest_of_each_stage(fitting: list[Candidate]) -> list[Candidate]:
    largest: dict[ZeroSettings, Candidate] = {}
    for s in fitting:  # smaller micro-batches of a stage come first
        largest[s.zero] = s
    return list(largest.values())


def _with(config: Config, phase: str, chosen: Candidate) -> Config:
    zero: dict[str, Any] = {**chosen.config.deepspeed.get("zero_optimization", {}), "stage": chosen.zero.stage}
    if not chosen.zero.offload_optimizer:
        zero.pop("offload_optimizer", None)
    own = PhaseSettings(micro_batch_size=chosen.micro_batch_size,
                        deepspeed={**chosen.config.deepspeed, "zero_optimization": zero})
    return config.with_settings(phase, own)


def _line(phase: str, s: Candidate, memory_gib: float, rates: Rates | None, ranks_per_host: int) -> str:
    why = ("least bytes moved; no rates are known of this machine" if rates is None else
           f"{rates.step_seconds(s.work, ranks_per_host):.3g} s a step predicted, {rates.source}")
    return (f"auto: {phase}: ZeRO {s.zero.stage}{' offload' if s.zero.offload_optimizer else ''}, micro-batch "
            f"{s.micro_batch_size}: {s.peak_bytes / 2**30:.2f} of {memory_gib:.1f} GiB predicted ({why})")
