"""Resolve `auto` in a recipe: the settings of phases, and the number of data workers.

A LoRA phase leaves memory free and may no longer need its ZeRO stage: at stage 1, for example, the
frozen base is not gathered in every step.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from prelora_ds.accelerator import accelerator_name, gpu_total_gib
from prelora_ds.config.phases import PhaseConfig, PhaseSettings
from prelora_ds.config.tree import Config, ZeroSettings
from prelora_ds.console import stamped
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import plans_at_rank
from prelora_ds.core.plan import Plan
from prelora_ds.cost.candidates import Candidate, fastest, predict_candidate, predict_candidates
from prelora_ds.cost.forecast import fastest_images_per_s
from prelora_ds.cost.machines import read_calibration
from prelora_ds.cost.timing import Rates, data_sheet_rates, gpu_named
from prelora_ds.data.setup import TrainData, cores_per_rank, count_workers
from prelora_ds.engine.runtime import local_world_size, on_rank_0, rank_memory_gib
from prelora_ds.errors import ConfigError
from prelora_ds.hosts.discovery import Ranks


def resolve_auto(config: Config, layout: Layout, ranks: Ranks) -> Config:
    """Return ``config`` with every `auto` of a phase resolved; rank 0 prints each choice.

    Adapters are assumed to have the largest rank that their rule can give, and where only some of
    them train at a time, memory is predicted for all of them. Raises ConfigError if
    nothing fits, if the calibration cannot be read, or if the model is not a ViT, because only the
    costs of a ViT are known.
    """
    world_size = ranks.world_size
    ranks_per_host = ranks.local_size or 1
    if not any(phase.is_auto for phase in config.phase_list):
        return config
    if config.model.factory is not None:
        raise ConfigError(
            "phases",
            "auto",
            "only the costs of the ViT are known",
            "set micro_batch_size and zero_stage to numbers",
        )
    memory_gib, rates = _machine(config, world_size, ranks_per_host)
    for plan in plans_at_rank(config.specs(), layout, seed=config.run.seed):
        phase = config.phase(plan.phase)
        if not phase.is_auto:
            continue
        base = config.for_phase(plan.phase)
        candidates = list(_setting_candidates(base, phase, plan, layout, world_size))
        fitting = [candidate for candidate in candidates if candidate.fits(memory_gib)]
        if not fitting:
            smallest = min(candidates, key=lambda candidate: candidate.peak_bytes)
            raise ConfigError(
                f"phases.{plan.phase}",
                "auto",
                f"no setting fits in {memory_gib:.1f} GiB per rank; the smallest "
                f"(ZeRO {smallest.zero.stage}, micro-batch {smallest.micro_batch_size}) needs "
                f"{smallest.peak_bytes / 2**30:.1f} GiB",
                "use more ranks, or set a higher machine.memory_gib if there is more memory",
            )
        chosen = fastest(_largest_of_each_stage(fitting), rates, ranks_per_host)
        config = _with_setting(config, plan.phase, chosen)
        if ranks.rank == 0:
            message = _message(plan.phase, chosen, memory_gib, rates, ranks_per_host)
            print(stamped(message), flush=True)
    return config


def resolve_workers(
    config: Config, data: TrainData, layout: Layout, say: Callable[[str], None]
) -> int:
    """Resolve `data.workers`; "auto" is measured on rank 0. Collective."""
    if config.data.workers != "auto":
        return config.data.workers

    world_size = torch.distributed.get_world_size()
    masks: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(masks, (socket.gethostname(), frozenset(os.sched_getaffinity(0))))

    def measure() -> tuple[int, str]:
        ranks_here = local_world_size()
        gpu = gpu_named(accelerator_name(), gpu_total_gib() or 0.0)
        images_per_s = fastest_images_per_s(config, layout, ranks_here, world_size, gpu)
        return count_workers(config, data, cores=cores_per_rank(masks), images_per_s=images_per_s)

    workers, why = on_rank_0(measure)
    say(why)
    return workers


def _machine(config: Config, world_size: int, ranks_per_host: int) -> tuple[float, Rates | None]:
    """Return the memory of this rank in GiB, and the rates of its device if they are known."""
    memory_gib = rank_memory_gib(ranks_per_host)
    gpu = gpu_named(accelerator_name(), gpu_total_gib() or 0.0)
    hosts = max(1, world_size // ranks_per_host)
    rates = data_sheet_rates(gpu, hosts=hosts) if gpu else None
    if config.machine.calibration is not None:
        rates, _ = read_calibration(Path(config.machine.calibration), "machine.calibration")
    return config.machine.memory_gib or memory_gib, rates


def _setting_candidates(
    config: Config, phase: PhaseConfig, plan: Plan, layout: Layout, world_size: int
) -> Iterator[Candidate]:
    """Yield all settings that ``phase`` allows; `auto` allows all stages or micro-batches."""
    for zero in _stages(config, plan) if phase.zero_stage == "auto" else [config.zero]:
        micro_batch_size = config.train.micro_batch_size
        if phase.micro_batch_size == "auto":
            yield from predict_candidates(config, plan, layout, zero, world_size)
        elif zero.stage or world_size * micro_batch_size == config.train.global_batch_size:
            # Stage 0 does not accumulate gradients.
            yield predict_candidate(config, plan, layout, zero, world_size, micro_batch_size)


def _stages(config: Config, plan: Plan) -> Iterator[ZeroSettings]:
    """Yield all ZeRO stages that can run ``plan``, with and without offload if the run uses it."""
    for stage in range(4):
        if not config.runs_at(stage, plan):
            continue
        for offload in {False, config.zero.offload_optimizer and stage >= 2}:
            yield config.zero_at(stage, offload_optimizer=offload)


def _largest_of_each_stage(fitting: list[Candidate]) -> list[Candidate]:
    """Return the setting with the largest micro-batch of each stage."""
    largest: dict[ZeroSettings, Candidate] = {}
    for candidate in fitting:  # Smaller micro-batches of a stage come first.
        largest[candidate.zero] = candidate
    return list(largest.values())


def _with_setting(config: Config, phase: str, chosen: Candidate) -> Config:
    """Return ``config`` with the chosen setting for ``phase``."""
    zero: dict[str, Any] = {
        **chosen.config.deepspeed.get("zero_optimization", {}),
        "stage": chosen.zero.stage,
    }
    if not chosen.zero.offload_optimizer:
        zero.pop("offload_optimizer", None)
    phase_settings = PhaseSettings(
        micro_batch_size=chosen.micro_batch_size,
        deepspeed={**chosen.config.deepspeed, "zero_optimization": zero},
    )
    return config.with_settings(phase, phase_settings)


def _message(
    phase: str, chosen: Candidate, memory_gib: float, rates: Rates | None, ranks_per_host: int
) -> str:
    """Describe the choice for ``phase`` and its reason in one line."""
    if rates is None:
        why = "fewest bytes moved; no calibration for this machine"
    else:
        seconds = rates.step_seconds(chosen.work, ranks_per_host)
        why = f"{seconds:.3g} s per step predicted, {rates.source}"
    offload = " offload" if chosen.zero.offload_optimizer else ""
    return (
        f"auto: {phase}: ZeRO {chosen.zero.stage}{offload}, micro-batch {chosen.micro_batch_size}: "
        f"{chosen.peak_bytes / 2**30:.2f} of {memory_gib:.1f} GiB predicted ({why})"
    )
