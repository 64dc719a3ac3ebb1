"""Predicted bytes per rank and owner, from a table of shapes. Shares no code with engine/census.py.

n: elements of all parameters, t: of those that train, w: ranks. BF16 weights (2 bytes), fp32 gradients, masters and
Adam moments (4 bytes each). Stage 3 pads each parameter to a multiple of w, so that a bias of 1,408 is one of 2,048 on
1,024 ranks; what stages 1 and 2 pad (at most 2w elements a group) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prelora_ds.config.tree import ZeroSettings
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan

BF16, FP32 = 2, 4


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
    """Live bytes of one rank from the third step of a plan on.

    Source of each term: ZeRO (Rajbhandari et al. 2020, section 3), and where DeepSpeed 0.19 keeps more, what its
    wrappers hold: at stage 1 with fp32 accumulation a whole fp32 gradient beside the bf16 one; at stage 3 small
    parameters whole, the reduction bucket allocated once; with offload a host copy of gradients and staging buffers.
    ``parked`` are the parameters whose fp32 values stay on the host while they are frozen. The kernel "merged" keeps
    an fp32 base of each frozen weight.
    """
    sizes = {name: math.prod(shape) for name, shape in plan.parameters(layout).items()}
    small = [name for name, size in sizes.items() if size <= zero.persistence_threshold]
    if zero.stage == 3:
        sizes = {name: -(-size // world_size) * world_size for name, size in sizes.items()}
    trained = [sizes[name] for name in plan.trainable]
    n, t, w, stage = sum(sizes.values()), sum(trained), world_size, zero.stage
    sharded = w if stage else 1
    weights, buffers = BF16 * n, 0
    if kernel == "merged":
        weights += FP32 * sum(sizes[f"{module}.weight"] for module in plan.frozen_bases())
    if stage == 3:
        # A world of one gathers nothing: its partition of a parameter is the parameter.
        gathered = sum(sizes[name] for name in small) if w > 1 else 0
        weights = BF16 * n // w + BF16 * gathered
        buffers = FP32 * min(zero.reduce_bucket_size, t)
    if zero.offload_optimizer and stage == 2:
        buffers = BF16 * t // w + 2 * BF16 * max(trained)
    return Bytes(weights=weights, gradients=_gradients(t, w, zero, after_backward), masters=FP32 * t // sharded,
                 moments=2 * FP32 * t // sharded, buffers=buffers,
                 host=FP32 * sum(sizes[name] for name in parked - plan.trainable) // w)


def _gradients(t: int, w: int, zero: ZeroSettings, after_backward: bool) -> int:
    share = FP32 * t // w
    if zero.stage == 0:
        return BF16 * t if after_backward else 0
    if zero.stage == 1:
        return FP32 * t + (BF16 * t if after_backward else 0)
    if zero.stage == 2:
        at_rest = share if zero.offload_optimizer else 0
        return at_rest + share if after_backward else at_rest
    return share * (2 if zero.offload_optimizer else 1)


def worst_deviation(predicted: Bytes, measured: Mapping[str, int]) -> float:
    """The largest relative difference of an owner that either side says holds bytes."""
    pairs = [(p, measured.get(owner, 0)) for owner, p in vars(predicted).items()]
    return max((abs(m - p) / max(p, m) for p, m in pairs if p or m), default=0.0)
