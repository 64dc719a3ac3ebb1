"""Predict the bytes per rank and owner from the shapes of all parameters.

This module shares no code with engine/census.py, which measures them.

n is the number of elements of all parameters, t of those that the optimizer holds, a of those that train now
(`Plan.training`), and w the number of ranks. Weights are BF16 (2 bytes); gradients, masters and Adam moments are fp32
(4 bytes each). Adapters that are pruned have two more fp32 values per element, which count as moments. Stage 3 pads
each parameter to a multiple of w, so a bias of 1,408 elements occupies 2,048 on 1,024 ranks. The padding of stages 1
and 2 (at most 2w elements per group) is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prelora_ds.config.tree import ZeroSettings
from prelora_ds.core.adapters import KINDS
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.core.quantised import BYTES

BF16 = 2  # bytes
FP32 = 4  # bytes
# How many buckets the gradients are reduced in at stages 2 and 3. One bucket would be full only at the end of the
# backward pass, so that nothing could overlap with it; many small ones would not use the bandwidth of the network.
BUCKETS = 8
# The elements of the smallest bucket. Below about 4 MB the latency of a collective counts, not its bytes.
LEAST_BUCKET = 2**20


@dataclass(frozen=True)
class Bytes:
    """Bytes of one rank by owner, at rest (between steps) or at the end of a backward pass."""

    weights: int
    gradients: int
    masters: int
    moments: int
    buffers: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments + self.buffers


def predict_bytes(plan: Plan, layout: Layout, zero: ZeroSettings, world_size: int, *, after_backward: bool,
                  kernel: str = "auto", parked: frozenset[str] = frozenset()) -> Bytes:
    """Live bytes of one rank, from the third step of a plan onwards.

    The terms are those of ZeRO (Rajbhandari et al. 2020, section 3), plus what the wrappers of DeepSpeed 0.19 keep in
    addition: at stage 1 with fp32 accumulation a complete fp32 gradient besides the BF16 one; at stage 3 complete small
    parameters, and the reduction bucket, which is allocated once; with offload a host copy of the gradients, and
    staging buffers. What adapters keep besides their leaves counts as weights. Quantised weights are complete on every
    rank, also at stage 3, and their fp32 values stay on the host.

    kernel: "merged" keeps an fp32 copy of each frozen weight with an adapter.
    parked: the parameters whose fp32 values stay on the host while they are frozen, unless the kernel keeps them. Names
        that do not exist under the plan do not count.
    """
    sizes = {name: math.prod(shape) for name, shape in plan.in_module(layout).items()}
    small = [name for name, size in sizes.items() if size <= zero.persistence_threshold]
    if zero.stage == 3:
        sizes = {name: -(-size // world_size) * world_size for name, size in sizes.items()}
    trained = [sizes[name] for name in plan.trainable]
    n = sum(sizes.values())
    t = sum(trained)
    a = sum(sizes[name] for name in plan.training())
    w = world_size
    stage = zero.stage
    sharded = w if stage else 1

    weights = BF16 * n
    buffers = 0
    in_module = {f"{module}.weight" for module in plan.frozen_targets()} if kernel == "merged" else set()
    weights += FP32 * sum(sizes[name] for name in in_module)
    if stage == 3:
        # A single rank gathers nothing, because its partition of a parameter is the parameter.
        gathered = sum(sizes[name] for name in small) if w > 1 else 0
        weights = BF16 * n // w + BF16 * gathered
        buffers = zero.reduce_bytes * bucket_elements(plan, layout, zero)
    weights += besides_leaves(plan, layout) + quantised_bytes(plan, layout)
    if zero.offload_optimizer and stage == 2:
        buffers = BF16 * t // w + 2 * BF16 * max(trained)

    return Bytes(
        weights=weights,
        gradients=_gradients(t, a, w, zero, after_backward),
        masters=FP32 * t // sharded,
        moments=2 * FP32 * (t + sum(sizes[name] for name in plan.trainable & plan.measured(layout))) // sharded,
        buffers=buffers,
        host=FP32 * (sum(sizes[name] for name in (parked & sizes.keys()) - plan.trainable - in_module)
                     + sum(math.prod(layout.parameters[name]) for name in plan.quantised())) // w,
    )


def bucket_elements(plan: Plan, layout: Layout, zero: ZeroSettings) -> int:
    """The elements of a bucket in which gradients are reduced at stages 2 and 3.

    This is the size that the user has set. Otherwise there are about `BUCKETS` of them, but none has less than
    `LEAST_BUCKET` elements, and none is smaller than the largest parameter: DeepSpeed 0.19 reduces a parameter that is
    larger than its bucket in another way. No bucket is larger than what trains.
    """
    shapes = plan.parameters(layout)
    sizes = [math.prod(shapes[name]) for name in plan.trainable]
    total = sum(sizes)
    wanted = zero.reduce_bucket_size
    if wanted is None:
        wanted = max(*sizes, LEAST_BUCKET, -(-total // BUCKETS))
    return min(wanted, total)


def quantised_bytes(plan: Plan, layout: Layout) -> int:
    """The bytes of all quantised weights."""
    return sum(BYTES[plan.base_dtype](layout.parameters[name]) for name in plan.quantised())


def besides_leaves(plan: Plan, layout: Layout) -> int:
    """The bytes that adapters keep on every rank besides their leaves, without what a kernel keeps."""
    total = 0
    for kind in sorted({spec.kind for spec in plan.adapters.values()}):
        linears = [(layout.parameters[f"{path}.weight"], spec)
                   for path, spec in plan.adapters.items() if spec.kind == kind]
        total += KINDS[kind].bytes_besides_leaves(linears)
    return total


def _gradients(t: int, a: int, w: int, zero: ZeroSettings, after_backward: bool) -> int:
    """Only the BF16 gradients are spared by what does not train now: the fp32 buffers have room for all of t."""
    share = FP32 * t // w
    if zero.stage == 0:
        return BF16 * a if after_backward else 0
    if zero.stage == 1:
        return FP32 * t + (BF16 * a if after_backward else 0)
    if zero.stage == 2:
        at_rest = share if zero.offload_optimizer else 0
        return at_rest + share if after_backward else at_rest
    if zero.offload_optimizer:
        return 2 * share
    # Until the step, DeepSpeed 0.19 also holds zeros in BF16 for what does not train
    # (runtime/zero/stage3.py, independent_gradient_partition_epilogue).
    return share + (BF16 * (t - a) // w if after_backward else 0)


def worst_deviation(predicted: Bytes, measured: Mapping[str, int]) -> float:
    """The largest relative difference over the owners that have bytes on either side."""
    pairs = [(p, measured.get(owner, 0)) for owner, p in vars(predicted).items()]
    return max((abs(m - p) / max(p, m) for p, m in pairs if p or m), default=0.0)
