"""Settings of a phase (ZeRO stage, micro-batch): which of them a device has room for, and which is the fastest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prelora_ds.config.tree import Config, ZeroSettings
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.cost import flops as costs
from prelora_ds.cost.bytes import Bytes
from prelora_ds.cost.timing import Rates, Work, step_work

USABLE = 0.9  # of a device's memory: the rest is left to the driver, the allocator's fragments and temporaries


@dataclass(frozen=True)
class Setting:
    """A phase under one setting, all predicted. states, peak_bytes: of one rank (`costs.peak_bytes`)."""

    config: Config
    zero: ZeroSettings
    micro_batch_size: int
    states: Bytes
    peak_bytes: int
    work: Work

    def fits(self, memory_gib: float) -> bool:
        return self.peak_bytes <= USABLE * memory_gib * 2**30


def setting(config: Config, plan: Plan, layout: Layout, zero: ZeroSettings, world_size: int,
            micro_batch_size: int) -> Setting:
    """``config`` (of the plan's phase) with ``zero`` and ``micro_batch_size`` in the place of its own."""
    kernel, reuse = config.kernel(zero.stage), reuse_distance(config)
    image = costs.micro_batch(config.model, plan, layout, 1, kernel=kernel)
    accum = config.train.global_batch_size // (micro_batch_size * world_size)
    states, peak = costs.peak_bytes(plan, layout, zero, world_size, accum,
                                    micro_batch_size * (image.saved_bytes + image.recomputed_bytes), kernel=kernel,
                                    reuse_distance=reuse)
    work = step_work(config.model, plan, layout, zero, micro_batch_size=micro_batch_size, world_size=world_size,
                     accum=accum, kernel=kernel, reuse_distance=reuse)
    return Setting(config, zero, micro_batch_size, states, peak, work)


def settings(config: Config, plan: Plan, layout: Layout, zero: ZeroSettings, world_size: int) -> list[Setting]:
    """One for each micro-batch that divides a rank's share of the global batch, smallest first (even ones where pairs
    are mixed); at stage 0, which does not accumulate, the whole share alone."""
    share, pair = config.train.global_batch_size // world_size, 2 if config.data.mixes else 1
    sizes = [size for size in range(pair, share + 1, pair) if share % size == 0] if zero.stage else [share]
    return [setting(config, plan, layout, zero, world_size, size) for size in sizes]


def fastest(candidates: Iterable[Setting], rates: Rates | None, ranks_per_host: int) -> Setting:
    """The one of least predicted step time. Without rates of the machine the one that moves the fewest bytes between
    ranks and to the host, then in memory: the products are the same in all. Raises ValueError for none."""

    def cost(s: Setting) -> tuple[float, ...]:
        # Of equals the larger micro-batch: fewer calls, larger products.
        if rates is None:
            return (s.work.wire_gb + s.work.host_gb, s.work.state_gb, -s.micro_batch_size)
        return (rates.step_seconds(s.work, ranks_per_host), -s.micro_batch_size)

    return min(candidates, key=cost)


def reuse_distance(config: Config) -> int:
    """DeepSpeed's stage3_max_reuse_distance, in elements."""
    return int(config.deepspeed.get("zero_optimization", {}).get("stage3_max_reuse_distance", costs.REUSE_DISTANCE))
