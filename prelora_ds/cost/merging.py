"""The cost of a merge of adapters into the weights (ReLoRA), as `prelora_ds.engine.merge` does it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prelora_ds.config.model import ModelConfig
from prelora_ds.config.tree import ZeroSettings
from prelora_ds.core.adapters import kind_of
from prelora_ds.core.layout import Layout
from prelora_ds.core.merge import PROBES, Reset
from prelora_ds.core.plan import Plan
from prelora_ds.cost.bytes import FP32
from prelora_ds.cost.flops import micro_batch
from prelora_ds.cost.timing import Rates

# Of one core, measured on an AMD EPYC with torch 2.14: float64 products of rank 256, and seconds per element of the sum
# with its rounding to fp32, of a first value, of finding the smallest moments, and of a random order.
PRODUCT_FLOPS = 30e9  # per second
SUM_S = 2.7e-9
DRAW_S = 3.7e-9
CHOOSE_S = 20e-9
SHUFFLE_S = 10e-9


@dataclass(frozen=True)
class MergeWork:
    """The work of one rank in a merge.

    flops: float64 FLOPs of the products B A.
    summed: elements of the weights to which products are added.
    drawn: elements of adapters; every rank makes the first values of all of them.
    chosen, shuffled: elements among which those are chosen whose moments are reset, by magnitude and at random.
    forward_flops: BF16 FLOPs of the forward passes that measure the change of the outputs.
    all_reduce: the payload of the all-reduces, in bytes.
    """

    flops: int
    summed: int
    drawn: int
    chosen: int
    shuffled: int
    forward_flops: int
    all_reduce: int

    def seconds(self, rates: Rates, world_size: int) -> float:
        """Predict the seconds of a merge if one core of the host does the rank's part of it, but for forward passes.

        Writing the weights for later checkpoints is not included.
        """
        core_s = math.fsum((self.flops / PRODUCT_FLOPS, SUM_S * self.summed, DRAW_S * self.drawn,
                            CHOOSE_S * self.chosen, SHUFFLE_S * self.shuffled))
        sent = 2 * self.all_reduce * (world_size - 1) / world_size
        return (core_s + self.forward_flops / 1e12 * rates.seconds["gemm_tflop"]
                + sent / 1e9 * rates.seconds["wire_gb"])


def merge_work(model: ModelConfig, plan: Plan, layout: Layout, reset: Reset, zero: ZeroSettings, world_size: int, *,
               kernel: str = "auto") -> MergeWork:
    """The work of one rank when all adapters of ``plan`` are merged.

    A rank multiplies only the rows of its share of a weight, 2 FLOPs per element and rank of the adapter; with the
    kernel ``merged`` it holds all of the weight. The fp32 values of A and B are gathered by an all-reduce, except at
    stage 0, their first moments too where ``reset`` goes by magnitude, and the merged weights where ranks hold shares
    of a weight that the module holds in full.
    """
    flops = summed = drawn = elements = sent = 0
    for path, spec in plan.adapters.items():
        shape = layout.parameters[f"{path}.weight"]
        size = math.prod(shape)
        own = size if kernel == "merged" else size // world_size
        flops += 2 * (spec.rank or 1) * own
        summed += own
        if kernel != "merged" and (zero.stage < 3 or size <= zero.persistence_threshold):
            sent += FP32 * size

        leaves = {leaf: math.prod(dims) for leaf, dims in kind_of(spec).parameters(shape, spec).items()}
        trained = sum(count for leaf, count in leaves.items() if f"{path}.{leaf}" in plan.trainable)
        drawn += sum(leaves.values())
        elements += trained
        if zero.stage:
            sent += FP32 * trained * (2 if reset.rule == "magnitude" else 1)
    forward = 2 * micro_batch(model, plan, layout, PROBES, kernel=kernel).forward_flops
    return MergeWork(flops, summed, drawn, elements * (reset.rule == "magnitude"), elements * (reset.rule == "random"),
                     forward, sent)
