"""A step-time model: the amount of each kind of work in a step, times the cost per unit on a machine.

The times of computing, the optimizer and communication are added up, without the reductions of gradients that a GPU
hides behind its backward pass (`overlap_comm`). Stage 3 prefetches weights as well, which is not counted: there the sum
is an upper bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from prelora_ds.config.model import ModelConfig
from prelora_ds.config.tree import ZeroSettings
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.cost import flops as costs


@dataclass(frozen=True)
class Work:
    """The work of one rank in an optimizer step. Except wire_gb, overlapped_gb and hops, it is local to the rank.

    gemm_tflop: large matrix products, in 1e12 FLOPs.
    adapter_tflop: products with A and B, in 1e12 FLOPs.
    traffic_gb: memory traffic of elementwise operations, in 1e9 bytes.
    state_gb: memory traffic of gradients and optimizer, in 1e9 bytes.
    calls: modules run, in thousands.
    tensors: operations that DeepSpeed does for each trained parameter on its own, in thousands.
    host_gb: traffic of optimizer offload, in 1e9 bytes.
    wire_gb: data sent to other ranks, in 1e9 bytes.
    hops: messages that wait for the one before, in thousands (log2 of the number of ranks per collective).
    overlapped_gb: the part of wire_gb that is sent while the backward pass computes.
    backward_share: the share of the computing (gemm_tflop, adapter_tflop and traffic_gb) that the backward pass has.
    """

    gemm_tflop: float = 0.0
    adapter_tflop: float = 0.0
    traffic_gb: float = 0.0
    state_gb: float = 0.0
    calls: float = 0.0
    tensors: float = 0.0
    host_gb: float = 0.0
    wire_gb: float = 0.0
    hops: float = 0.0
    overlapped_gb: float = 0.0
    backward_share: float = 0.0


COMPUTING = ("gemm_tflop", "adapter_tflop", "traffic_gb")
# The kinds of work, each of which has a rate.
KINDS = tuple(f.name for f in fields(Work) if f.name not in ("overlapped_gb", "backward_share"))
SHARED = ("wire_gb", "hops")  # kinds of work that are not local to a rank


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of each kind of `Work`.

    sharing: the slowdown of local work when all ranks of the host are busy (1 on GPUs).
    source: where the figures come from, in words.
    measured: whether they were fitted to measurements.
    overlaps: whether the device sends while it computes, as GPUs do.
    """

    seconds: Mapping[str, float]
    source: str
    measured: bool
    sharing: float = 1.0
    overlaps: bool = False

    def step_seconds(self, work: Work, ranks_per_host: int = 1) -> float:
        """Predict the seconds of an optimizer step."""
        seconds = {kind: self.seconds[kind] * getattr(work, kind) for kind in KINDS}
        shared = math.fsum(seconds.pop(kind) for kind in SHARED)
        slowdown = self.sharing if ranks_per_host > 1 else 1.0
        hidden = 0.0
        if self.overlaps:
            backward = work.backward_share * math.fsum(seconds[kind] for kind in COMPUTING) * slowdown
            hidden = min(self.seconds["wire_gb"] * work.overlapped_gb, backward)
        return math.fsum(seconds.values()) * slowdown + shared - hidden


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures of the device that one rank uses.

    bf16_tflops: dense BF16, in 1e12 FLOP/s.
    memory_gb_s: memory bandwidth.
    memory_gib: memory as the driver reports it.
    link_gb_s: bandwidth to the other GPUs of the host, in one direction.
    host_gb_s: bandwidth to the memory of the host, in one direction.
    """

    bf16_tflops: float
    memory_gb_s: float
    memory_gib: float
    link_gb_s: float
    host_gb_s: float = 25.0  # PCIe 4 x16, and the rank's share of the bandwidth of host memory


# A rank uses one of the two dies of an MI250X. Sources: the data sheets of NVIDIA A100, H100 and H200 (SXM; -PCIe and
# -NVL are the cards), GH200 (the one with 96 GB of HBM3), and of AMD Instinct MI250X.
GPUS = {
    "A100-40": Gpu(312.0, 1555.0, 39.5, 300.0),
    "A100-80": Gpu(312.0, 2039.0, 79.2, 300.0),
    "A100-40-PCIe": Gpu(312.0, 1555.0, 39.5, 32.0),
    "A100-80-PCIe": Gpu(312.0, 1935.0, 79.2, 32.0),
    "H100": Gpu(989.0, 3350.0, 79.6, 450.0),
    "H100-PCIe": Gpu(756.0, 2000.0, 79.6, 64.0),
    "H100-NVL": Gpu(835.0, 3900.0, 93.6, 300.0),
    "H200": Gpu(989.0, 4800.0, 139.0, 450.0),
    "H200-NVL": Gpu(835.0, 4800.0, 139.0, 450.0),
    "GH200": Gpu(989.0, 4000.0, 95.0, 450.0, host_gb_s=450.0),
    "MI250X": Gpu(191.5, 1638.0, 64.0, 50.0),
}
CARDS = ("PCIe", "NVL")  # other forms than SXM, as a key of `GPUS` and the driver's name state them
INTER_GB_S = 25.0  # per host: one adapter of 200 Gbit/s
LATENCY_S = 10e-6
# What a kernel costs that does nearly nothing: the host needs about that long to launch it. An assumption.
LAUNCH_S = 5e-6
# The kernels that DeepSpeed 0.19 launches for each trained parameter in an optimizer step, by stage, counted in its
# sources: at stage 0 the norm and the copies of each parameter (FP16_UnfusedOptimizer; `engine.norms` leaves out its
# overflow check, of 13 kernels), at stage 1 the accumulation (BF16_Optimizer); stage 2 works on flat tensors, and stage
# 3 on partitions of each parameter.
KERNELS_PER_TENSOR = (9, 5, 1, 12)
# The shares of the data-sheet figures that training is assumed to reach. They are not measured.
PRODUCT_EFFICIENCY = 0.45
MEMORY_EFFICIENCY = 0.7
LINK_EFFICIENCY = 0.8


def gpu_named(device_name: str | None, memory_gib: float) -> str | None:
    """The key of `GPUS` for a device name of the driver ("NVIDIA A100-SXM4-40GB"), or None."""
    if device_name is None:
        return None

    def card(name: str) -> list[str]:
        return [form for form in CARDS if re.search(rf"\b{form}\b", name, re.IGNORECASE)]

    matches = [key for key in GPUS
               if re.search(rf"\b{key.partition('-')[0]}\b", device_name) and card(key) == card(device_name)]
    return min(matches, key=lambda key: abs(GPUS[key].memory_gib - memory_gib), default=None)


def data_sheet_rates(name: str, *, hosts: int, intra_gb_s: float | None = None,
                     inter_gb_s: float | None = None) -> Rates:
    """The rates of the GPU ``name`` of `GPUS` from its data sheet, labelled as not measured.

    intra_gb_s: GB/s between one GPU and the others of its host.
    inter_gb_s: GB/s between one host, with all its adapters, and the others.

    A ring over several hosts uses every link, so the slowest link determines the rate. Raises KeyError for an unknown
    name.
    """
    gpu = GPUS[name]
    intra = intra_gb_s or gpu.link_gb_s
    link = intra if hosts == 1 else min(intra, inter_gb_s or INTER_GB_S)
    product = 1 / (gpu.bf16_tflops * PRODUCT_EFFICIENCY)
    memory = 1 / (gpu.memory_gb_s * MEMORY_EFFICIENCY)
    seconds = {
        "gemm_tflop": product,
        "adapter_tflop": product,
        "traffic_gb": memory,
        "state_gb": memory,
        "calls": 0.0,
        "tensors": 1e3 * LAUNCH_S,
        "host_gb": 1 / gpu.host_gb_s,
        "wire_gb": 1 / (link * LINK_EFFICIENCY),
        "hops": 1e3 * LATENCY_S,
    }
    source = (f"data sheet of {name}, not measured: {PRODUCT_EFFICIENCY:.0%} of {gpu.bf16_tflops:g} TFLOP/s in bf16, "
              f"{MEMORY_EFFICIENCY:.0%} of {gpu.memory_gb_s:g} GB/s of memory, {LINK_EFFICIENCY:.0%} of {link:g} GB/s "
              "between ranks (assumed shares)")
    return Rates(seconds, source, measured=False, overlaps=True)


def step_work(model: ModelConfig, plan: Plan, layout: Layout, zero: ZeroSettings, *, micro_batch_size: int,
              world_size: int, accum: int, kernel: str = "auto",
              reuse_distance: int = costs.REUSE_DISTANCE) -> Work:
    """The work of one rank in an optimizer step of ``accum`` micro-batches."""
    per_micro_batch = costs.micro_batch(model, plan, layout, micro_batch_size, kernel=kernel)
    comm = costs.communication(plan, layout, zero, accum, reuse_distance=reuse_distance)
    state = costs.state_traffic_bytes(plan, layout, zero, world_size, accum)
    return Work(
        gemm_tflop=accum * per_micro_batch.gemm_flops / 1e12,
        adapter_tflop=accum * per_micro_batch.adapter_flops / 1e12,
        traffic_gb=accum * per_micro_batch.traffic_bytes / 1e9,
        state_gb=state / 1e9,
        calls=accum * per_micro_batch.calls / 1e3,
        tensors=KERNELS_PER_TENSOR[zero.stage] * len(plan.trainable) / 1e3,
        host_gb=costs.host_traffic_bytes(plan, layout, zero, world_size) / 1e9,
        wire_gb=comm.wire_bytes(world_size) / 1e9,
        hops=comm.collectives * math.ceil(math.log2(world_size)) / 1e3,
        overlapped_gb=costs.overlapped_bytes(plan, layout, zero, comm, world_size) / 1e9,
        backward_share=1 - per_micro_batch.forward_flops / per_micro_batch.flops,
    )
