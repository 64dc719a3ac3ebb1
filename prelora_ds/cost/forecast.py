"""What a recipe would need and take on a machine that need not be there. Every figure is predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prelora_ds.config.load import check_world
from prelora_ds.config.tree import Config, ZeroSettings
from prelora_ds.core.controller import PhaseController
from prelora_ds.core.duration import Duration
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import PhaseSpec, plans_at_rank, thawed_later
from prelora_ds.core.plan import Plan
from prelora_ds.core.rank_rules.uniform import UniformRank
from prelora_ds.core.schedule import Timeline
from prelora_ds.core.switch_tests.prelora import Observation, Verdict, WindowStats
from prelora_ds.cost import flops as costs
from prelora_ds.cost.bytes import predict_bytes
from prelora_ds.cost.candidates import USABLE, reuse_distance, setting, settings
from prelora_ds.cost.machines import Cluster, rates_and_memory
from prelora_ds.cost.timing import Rates
from prelora_ds.errors import ConfigError

NOTES = (
    "All values are predictions. Bytes are per rank: states at the end of backward, activations at its start.",
    "peak: the larger of the two moments, with staging copies and gathered weights; it fits if it takes at most "
    f"{USABLE:.0%} of the memory.",
    "host: fp32 values, in host memory, of weights that a phase freezes and a later phase trains again.",
    "step: computation, optimizer and communication one after another, without loading, evaluation and checkpoints.",
    "jobs: of the given walltime, back to back; queueing, start-up and repeated steps are not included.",
)


def predict_run(config: Config, cluster: Cluster, layout: Layout, images: int, *, walltime_s: float | None = None,
                mean_rank: int = 30, calibration: Path | None = None) -> dict[str, Any]:
    """Bytes, step and epoch seconds per ZeRO stage and phase, and hours and jobs of the run, as JSON.

    layout: of the recipe's ViT. images: of an epoch. Every adapter has ``mean_rank``. Seconds and what
    fits are None where nothing is known of the machine.

    Raises ConfigError for a batch that does not divide, an unknown GPU, a bad calibration, or a model
    that is not a ViT.
    """
    check_costs_are_known(config)
    world = cluster.world_size
    check_world(config, world)
    rates, memory_gib = rates_and_memory(cluster, calibration)
    accum = config.grad_accum_steps(world)
    timeline = Timeline(images, config.train.global_batch_size, config.train.duration)
    rows, runs = [], []
    phases = config.specs()
    parked = [thawed_later(phases, layout, index) for index in range(len(phases))]
    for zero in _settings(config, accum):
        own = [_row(config, plan, layout, zero, cluster, rates, memory_gib, images, kept)
               for plan, kept in zip(plans_at_rank(phases, layout, mean_rank), parked, strict=True)]
        rows += own
        if rates is not None:
            runs.append(_run(config, layout, zero, own, timeline, walltime_s))
    return {"predicted": True, "recipe": config.run.name, **asdict(cluster), "world_size": world, "images": images,
            "mean_rank": mean_rank, "micro_batch_size": config.train.micro_batch_size, "grad_accum_steps": accum,
            "walltime_s": walltime_s, "memory_gib": memory_gib,
            "rates": rates and asdict(rates), "rows": rows, "runs": runs, "notes": list(NOTES)}


def check_costs_are_known(config: Config) -> None:
    """Raise ConfigError for a model whose costs are not known."""
    if config.model.factory is not None:
        raise ConfigError("model.factory", config.model.factory, "only the costs of the ViT are known",
                          "plan a recipe without model.factory")


def fastest_images_per_s(config: Config, layout: Layout, ranks_per_host: int, world_size: int,
                         gpu: str | None) -> float | None:
    """Images per second that one rank takes in its fastest phase, as predicted for ``gpu``, a key of `GPUS`.

    None without one, for a model that is not a ViT, and for hosts that differ in ranks.
    """
    if gpu is None or config.model.factory is not None or world_size % ranks_per_host:
        return None
    cluster = Cluster(world_size // ranks_per_host, ranks_per_host, gpu)
    rows = predict_run(config, cluster, layout, images=1)["rows"]  # the time of a step knows no epoch
    step_s = min(row["step_s"] for row in rows if (zero := config.for_phase(row["phase"]).zero)
                 and (row["stage"], row["offload_optimizer"]) == (zero.stage, zero.offload_optimizer))
    return config.train.global_batch_size / world_size / float(step_s)


def _settings(config: Config, accum: int) -> Iterator[ZeroSettings]:
    """All stages that can train this recipe, and the configured one with offload if it has that."""
    merged = any(config.for_phase(phase.name).adapters.mode == "merged" for phase in config.phase_list)
    for stage in range(4):
        if not (stage == 0 and accum > 1) and not (stage == 3 and merged):
            yield replace(config.zero, stage=stage, offload_optimizer=False)
    if config.zero.offload_optimizer:
        yield config.zero


def _row(config: Config, plan: Plan, layout: Layout, zero: ZeroSettings, cluster: Cluster, rates: Rates | None,
         memory_gib: float | None, images: int, parked: frozenset[str]) -> dict[str, Any]:
    config = config.for_phase(plan.phase)
    world, batch, micro = cluster.world_size, config.train.global_batch_size, config.train.micro_batch_size
    image = costs.micro_batch(config.model, plan, layout, 1, kernel=config.kernel(zero.stage))
    own, every = setting(config, plan, layout, zero, world, micro), settings(config, plan, layout, zero, world)
    step_s = rates and rates.step_seconds(own.work, cluster.gpus_per_host)
    extra = costs.buckets_bytes(plan, layout, zero) + costs.gathered_bytes(plan, layout, zero,
                                                                           reuse_distance=reuse_distance(config))
    host = predict_bytes(plan, layout, zero, world, after_backward=False, parked=parked).host
    return {"stage": zero.stage, "offload_optimizer": zero.offload_optimizer, "phase": plan.phase,
            **{f"{owner}_bytes": getattr(own.states, owner)
               for owner in ("weights", "gradients", "masters", "moments")},
            "buckets_bytes": own.states.buffers + extra, "activations_bytes": micro * image.saved_bytes,
            "peak_bytes": own.peak_bytes, "host_bytes": host,
            "fits": None if memory_gib is None else own.fits(memory_gib),
            "largest_micro_batch": memory_gib and max((s.micro_batch_size for s in every if s.fits(memory_gib)),
                                                      default=0),
            "step_s": step_s, "epoch_s": step_s and step_s * images / batch,
            "wire_bytes": int(own.work.wire_gb * 1e9), "gflop_per_image": image.flops / 1e9}


def _run(config: Config, layout: Layout, zero: ZeroSettings, rows: list[dict[str, Any]], timeline: Timeline,
         walltime_s: float | None) -> dict[str, Any]:
    step_s = {row["phase"]: row["step_s"] for row in rows}

    def entry(steps: dict[str, int]) -> dict[str, Any]:
        seconds = sum(step_s[phase] * count for phase, count in steps.items())
        return {"steps": steps, "hours": seconds / 3600, "jobs": walltime_s and math.ceil(seconds / walltime_s)}

    tests = any(spec.until is not None and not isinstance(spec.until, Duration) for spec in config.specs())
    return {"stage": zero.stage, "offload_optimizer": zero.offload_optimizer,
            "earliest": entry(steps_of_phases(config, layout, timeline, passes=True)) if tests else None,
            "never": entry(steps_of_phases(config, layout, timeline, passes=False))}


@dataclass(frozen=True)
class _Foreseen:
    """A test of which only its outcome is known: it passes as soon as it is asked, or never."""

    k: int
    m: int
    passes: bool
    title = "a test"

    def close(self, index: int, observations: Sequence[Observation]) -> WindowStats:
        return WindowStats(index, observations[-1].step, 0.0, {})

    def __call__(self, windows: Sequence[WindowStats]) -> Verdict:
        return Verdict(self.passes, "", {}, ())


def steps_of_phases(config: Config, layout: Layout, timeline: Timeline, *, passes: bool) -> dict[str, int]:
    """Steps of each phase when every test passes as early as it can, or when none ever does."""
    phases = [_foreseen(spec, passes) for spec in config.specs()]
    controller = PhaseController(layout=layout, timeline=timeline, phases=phases, seed=0)
    state, begun, steps = controller.initial(), 0, {}
    for tick in sorted(timeline.ticks(config.observe.every))[:-1]:  # what is decided after the last step begins nothing
        after = controller.next(state, Observation(tick, 1, 0.0, {}))
        if after.index != state.index:
            steps[phases[state.index].name] = tick - begun
            begun = tick
        state = after
    return {**steps, phases[state.index].name: timeline.total_steps - begun}


def _foreseen(spec: PhaseSpec, passes: bool) -> PhaseSpec:
    """``spec`` without what only a run can tell: its test's windows, and the ranks that rest on them."""
    if spec.until is not None and not isinstance(spec.until, Duration):
        spec = replace(spec, until=_Foreseen(spec.until.k, spec.until.m, passes))
    if spec.adapters is None:
        return spec
    return replace(spec, adapters=replace(spec.adapters, ranks=UniformRank(spec.adapters.ranks.highest)))
