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
from prelora_ds.config.adapters import Mode
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

KERNELS: tuple[Mode, ...] = ("branch", "merged")  # those that `auto` chooses from


def resolve_auto(config: Config, layout: Layout, ranks: Ranks) -> Config:
    """Return ``config`` with every `auto` of a phase resolved; rank 0 prints each choice.

    On a GPU these include the kernel of adapters, for which the rule of `Config.kernel` was measured on a CPU.

    Adapters are assumed to have the largest rank that their rule can give, and where only some of
    them train at a time, memory is predicted for all of them. Raises ConfigError if
    nothing fits, if the calibration cannot be read, or if the model is not a ViT, because only the
    costs of a ViT are known.
    """
    world_size = ranks.world_size
    ranks_per_host = ranks.local_size or 1
    on_gpu = accelerator_name() is not None and config.model.factory is None
    if not any(phase.is_auto for phase in config.phase_list) and not on_gpu:
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
        if on_gpu:
            config, message = _with_kernel(config, plan, layout, world_size, ranks_per_host, memory_gib, rates)
            if message and ranks.rank == 0:
                print(stamped(message), flush=True)
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


def _with_kernel(config: Config, plan: Plan, layout: Layout, world_size: int, ranks_per_host: int, memory_gib: float,
                 rates: Rates | None) -> tuple[Config, str]:
    """Return ``config`` with the kernel of the plan's adapters, if it is `auto` and open, and the reason in words."""
    base = config.for_phase(plan.phase)
    if not plan.frozen_targets() or not base.chooses_kernel:
        return config, ""
    phase = config.phase(plan.phase)
    best: dict[Mode, Candidate] = {}
    for mode in KERNELS:
        own = config.with_phase_kernel(plan.phase, mode).for_phase(plan.phase)
        candidates = _setting_candidates(own, phase, plan, layout, world_size)
        fitting = [each for each in candidates if own.runs_at(each.zero.stage, plan) and each.fits(memory_gib)]
        if fitting:
            best[mode] = fastest(_largest_of_each_stage(fitting), rates, ranks_per_host)
    key = config.adapters_key(plan.phase, "mode")
    if rates is None or len(best) < len(KERNELS):
        why = "there are no figures for this GPU" if rates is None else "merged does not fit, or cannot run at stage 3"
        return config.with_phase_kernel(plan.phase, KERNELS[0]), f"auto: {key}: {KERNELS[0]} ({why})"
    seconds = {mode: rates.step_seconds(each.work, ranks_per_host) for mode, each in best.items()}
    chosen = min(KERNELS, key=lambda mode: seconds[mode])
    compared = ", ".join(f"{1e3 * seconds[mode]:.3g} ms per step with {mode}" for mode in KERNELS)
    return config.with_phase_kernel(plan.phase, chosen), (
        f"auto: {key}: {chosen} ({compared} in phase {plan.phase}, {_kind_of_figures(rates)})")


def _kind_of_figures(rates: Rates) -> str:
    return f"{'measured rates' if rates.measured else 'modelled'}: {rates.source}"


def _machine(config: Config, world_size: int, ranks_per_host: int) -> tuple[float, Rates | None]:
    """Return the memory of this rank in GiB, and the rates of its device if they are known."""
    memory_gib = rank_memory_gib(ranks_per_host)
    gpu = gpu_named(accelerator_name(), gpu_total_gib() or 0.0)
    hosts = max(1, world_size // ranks_per_host)
    rates = data_sheet_rates(gpu, hosts=hosts) if gpu else None
    if config.machine.calibration is not None:
        rates, _ = read_calibration(Path(config.machine.calibration), "machine.calibration")
        if rates.overlaps != (accelerator_name() is not None):
            measured, here = ("a GPU", "the CPU") if rates.overlaps else ("a CPU", "a GPU")
            raise ConfigError("machine.calibration", config.machine.calibration,
                              f"was measured on {measured}, but this run computes on {here}",
                              "write one on this machine with `prelora calibrate`, or set machine.calibration=null")
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
        why = f"{seconds:.3g} s per step predicted, {_kind_of_figures(rates)}"
    offload = " offload" if chosen.zero.offload_optimizer else ""
    return (
        f"auto: {phase}: ZeRO {chosen.zero.stage}{offload}, micro-batch {chosen.micro_batch_size}: "
        f"{chosen.peak_bytes / 2**30:.2f} of {memory_gib:.1f} GiB predicted ({why})"
    )
