"""A step-time model: what a step does, in a few kinds of work, times what a unit of each costs on a machine.

Computing, the optimizer and communication are added up, as if none ran beside another: an upper bound where DeepSpeed
overlaps them (`overlap_comm`, stage 3's prefetching).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from prelora_ds.config.model import ModelConfig
from prelora_ds.config.tree import ZeroSettings
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.cost import flops as costs


@dataclass(frozen=True)
class Work:
    """What one rank does in an optimizer step. All but wire_gb and hops are its own.

    gemm_tflop, adapter_tflop: 1e12 FLOPs of large products, and of those with A and B. traffic_gb: 1e9 bytes of
    elementwise work. state_gb: of gradients and optimizer. calls: thousands of modules run. host_gb: of optimizer
    offload. wire_gb: sent to other ranks. hops: thousands of messages that wait for the one before (log2 of the ranks a
    collective).
    """

    gemm_tflop: float = 0.0
    adapter_tflop: float = 0.0
    traffic_gb: float = 0.0
    state_gb: float = 0.0
    calls: float = 0.0
    host_gb: float = 0.0
    wire_gb: float = 0.0
    hops: float = 0.0


KINDS = tuple(f.name for f in fields(Work))
SHARED = ("wire_gb", "hops")  # kinds of work that a rank does together with others


@dataclass(frozen=True)
class Rates:
    """Seconds for a unit of each kind of `Work`.

    sharing: how much longer a rank's own work takes while the other ranks of its host work too (1 on GPUs).
    source: in words, where the figures come from; measured: whether they were fitted to measurements.
    """

    seconds: Mapping[str, float]
    source: str
    measured: bool
    sharing: float = 1.0

    def step_seconds(self, work: Work, ranks_per_host: int = 1) -> float:
        """Predicted seconds of an optimizer step."""
        seconds = {kind: self.seconds[kind] * amount for kind, amount in asdict(work).items()}
        shared = math.fsum(seconds.pop(kind) for kind in SHARED)
        return math.fsum(seconds.values()) * (self.sharing if ranks_per_host > 1 else 1.0) + shared


@dataclass(frozen=True)
class Gpu:
    """Figures of a data sheet, of what one rank drives; memory as the driver reports it, in GiB."""

    bf16_tflops: float
    memory_gb_s: float
    memory_gib: float
    link_gb_s: float


# Dense BF16, HBM bandwidth, and the links to the other GPUs of the host in one direction. A rank drives one of the two
# dies of an MI250X. Sources: NVIDIA A100, H100 and H200 (SXM) data sheets, AMD Instinct MI250X data sheet.
GPUS = {
    "A100-40": Gpu(312.0, 1555.0, 39.5, 300.0),
    "A100-80": Gpu(312.0, 2039.0, 79.2, 300.0),
    "H100": Gpu(989.0, 3350.0, 79.6, 450.0),
    "H200": Gpu(989.0, 4800.0, 139.0, 450.0),
    "MI250X": Gpu(191.5, 1638.0, 64.0, 50.0),
}
INTER_GB_S = 25.0  # of a host: one 200 Gbit/s adapter
LATENCY_S = 10e-6
HOST_GB_S = 25.0  # PCIe 4 x16 and a rank's share of the host's memory
# Shares of the data sheet that training is taken to reach: assumptions, not measurements.
PRODUCT_EFFICIENCY, MEMORY_EFFICIENCY, LINK_EFFICIENCY = 0.45, 0.7, 0.8


def gpu_named(device_name: str | None, memory_gib: float) -> str | None:
    """The key of `GPUS` for a device as its driver names it ("NVIDIA A100-SXM4-40GB"), or None."""
    known = [key for key in GPUS if device_name and re.search(rf"\b{key.partition('-')[0]}\b", device_name)]
    return min(known, key=lambda key: abs(GPUS[key].memory_gib - memory_gib), default=None)


def data_sheet_rates(name: str, *, hosts: int, intra_gb_s: float | None = None,
                     inter_gb_s: float | None = None) -> Rates:
    """Rates of the GPU ``name`` of `GPUS` from its data sheet: not measured, and labelled so.

    A ring over hosts passes every link, so the slowest one decides: ``intra_gb_s`` is that of a GPU to the others of
    its host, ``inter_gb_s`` that of a host with all its adapters. Raises KeyError for a name that is not there.
    """
    gpu = GPUS[name]
    intra = intra_gb_s or gpu.link_gb_s
    link = intra if hosts == 1 else min(intra, inter_gb_s or INTER_GB_S)
    product, memory = 1 / (gpu.bf16_tflops * PRODUCT_EFFICIENCY), 1 / (gpu.memory_gb_s * MEMORY_EFFICIENCY)
    seconds = {"gemm_tflop": product, "adapter_tflop": product, "traffic_gb": memory, "state_gb": memory, "calls": 0.0,
               "host_gb": 1 / HOST_GB_S, "wire_gb": 1 / (link * LINK_EFFICIENCY), "hops": 1e3 * LATENCY_S}
    source = (f"data sheet of {name}, not measured: {PRODUCT_EFFICIENCY:.0%} of {gpu.bf16_tflops:g} TFLOP/s in bf16, "
              f"{MEMORY_EFFICIENCY:.0%} of {gpu.memory_gb_s:g} GB/s of memory, {LINK_EFFICIENCY:.0%} of {link:g} GB/s "
              "between ranks (assumed shares)")
    return Rates(seconds, source, measured=False)


def step_work(model: ModelConfig, plan: Plan, layout: Layout, zero: ZeroSettings, *, micro_batch_size: int,
              world_size: int, accum: int, kernel: str = "auto",
              reuse_distance: int = costs.REUSE_DISTANCE) -> Work:
    """The work of one rank in an optimizer step of ``accum`` micro-batches."""
    one = costs.micro_batch(model, plan, layout, micro_batch_size, kernel=kernel)
    comm = costs.communication(plan, layout, zero, accum, reuse_distance=reuse_distance)
    state = costs.state_traffic_bytes(plan, layout, zero, world_size, accum)
    return Work(
        gemm_tflop=accum * one.gemm_flops / 1e12,
        adapter_tflop=accum * one.adapter_flops / 1e12,
        traffic_gb=accum * one.traffic_bytes / 1e9,
        state_gb=state / 1e9,
        calls=accum * one.calls / 1e3,
        host_gb=costs.host_traffic_bytes(plan, layout, zero, world_size) / 1e9,
        wire_gb=comm.wire_bytes(world_size) / 1e9,
        hops=comm.collectives * math.ceil(math.log2(world_size)) / 1e3,
    )
