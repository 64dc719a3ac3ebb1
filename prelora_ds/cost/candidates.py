"""Candidate settings of a phase (ZeRO stage, micro-batch size): which fit on a device, and which is the fastest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from prelora_ds.config.tree import Config, ZeroSettings
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.cost import flops as costs
from prelora_ds.cost.bytes import Bytes
from prelora_ds.cost.timing import Rates, Work, step_work

USABLE = 0.9  # share of a device's memory; the rest is for the driver, fragmentation and temporaries


@dataclass(frozen=True)
class Candidate:
    """A phase with one choice of ZeRO stage and micro-batch size, and what is predicted for it.

    states: the states of one rank at the end of the backward pass (`costs.peak_bytes`).
    peak_bytes: the device peak of one rank in a step. Where adapters are chosen again and again, it is that of the
        plan's own choice or that of all adapters at once, whichever is larger.
    work: the work of one rank in an optimizer step.
    """

    config: Config
    zero: ZeroSettings
    micro_batch_size: int
    states: Bytes
    peak_bytes: int
    work: Work

    def fits(self, memory_gib: float) -> bool:
        return self.peak_bytes <= USABLE * memory_gib * 2**30


def predict_candidate(config: Config, plan: Plan, layout: Layout, zero: ZeroSettings, world_size: int,
                      micro_batch_size: int) -> Candidate:
    """Predict ``config`` (of the plan's phase) with ``zero`` and ``micro_batch_size`` instead of its own."""
    kernel = config.kernel(zero.stage)
    reuse = reuse_distance(config)
    accum = config.train.global_batch_size // (micro_batch_size * world_size)

    def states_and_peak(plan: Plan) -> tuple[Bytes, int]:
        image = costs.micro_batch(config.model, plan, layout, 1, kernel=kernel)
        activations = micro_batch_size * (image.saved_bytes + image.recomputed_bytes)
        return costs.peak_bytes(plan, layout, zero, world_size, accum, activations, kernel=kernel,
                                reuse_distance=reuse)

    states, peak = states_and_peak(plan)
    if plan.active is not None:
        peak = max(peak, states_and_peak(replace(plan, active=None))[1])
    work = step_work(config.model, plan, layout, zero, micro_batch_size=micro_batch_size, world_size=world_size,
                     accum=accum, kernel=kernel, reuse_distance=reuse)
    return Candidate(config, zero, micro_batch_size, states, peak, work)


def predict_candidates(config: Config, plan: Plan, layout: Layout, zero: ZeroSettings,
                       world_size: int) -> list[Candidate]:
    """One candidate per micro-batch size that divides the rank's share of the global batch, smallest first.

    The sizes are even where Mixup or CutMix mixes pairs. At stage 0, which does not accumulate, the only size is the
    full share.
    """
    share = config.train.global_batch_size // world_size
    sizes = [share]
    if zero.stage:
        unit = 2 if config.data.mixes else 1
        sizes = [size for size in range(unit, share + 1, unit) if share % size == 0]
    return [predict_candidate(config, plan, layout, zero, world_size, size) for size in sizes]


def fastest(candidates: Iterable[Candidate], rates: Rates | None, ranks_per_host: int) -> Candidate:
    """The candidate with the lowest predicted step time.

    Without rates of the machine, it is the one that moves the fewest bytes between ranks and to the host, and then the
    fewest in memory; matrix products are the same in all candidates. Raises ValueError if there are none.
    """

    def cost(candidate: Candidate) -> tuple[float, ...]:
        # Break ties in favour of the larger micro-batch: it has fewer calls and larger products.
        work = candidate.work
        if rates is None:
            return (work.wire_gb + work.host_gb, work.state_gb, -candidate.micro_batch_size)
        return (rates.step_seconds(work, ranks_per_host), -candidate.micro_batch_size)

    return min(candidates, key=cost)


def reuse_distance(config: Config) -> int:
    """The value of DeepSpeed's stage3_max_reuse_distance, in elements."""
    zero = config.deepspeed.get("zero_optimization", {})
    return int(zero.get("stage3_max_reuse_distance", costs.REUSE_DISTANCE))
