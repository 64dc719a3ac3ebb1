"""What a training step costs: FLOPs, activation bytes, bytes moved and communicated, of transformers' ViT.

Every term is counted from shapes by one walk over the modules in the order of the forward pass; none is fitted. Here a
"row" is one token of one image, and bf16 has 2 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prelora_ds.config.model import ModelConfig
from prelora_ds.config.tree import ZeroSettings
from prelora_ds.core.adapters import Needs, kind_of
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.cost.bytes import BF16, FP32, Bytes, predict_bytes

REUSE_DISTANCE = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance
PREFETCH_BUCKET = 50_000_000  # and stage3_prefetch_bucket_size, both in elements
ENGINE_BUCKET = 500_000_000  # elements of one all-reduce at stages 0 and 1 (DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE)


@dataclass(frozen=True)
class MicroBatch:
    """Forward and backward of one micro-batch on one rank.

    forward_flops: the forward pass alone. gemm_flops: all products of the step with weights, and attention's.
    adapter_flops: those of adapters. traffic_bytes: memory traffic of what is no large product (norms, GELU,
    residuals, softmax, adapters). calls: modules run and parameter hooks. saved_bytes: activations alive when backward
    begins; recomputed_bytes: those of one block that come back under activation checkpointing.
    """

    forward_flops: int
    gemm_flops: int
    adapter_flops: int
    traffic_bytes: int
    calls: int
    saved_bytes: int
    recomputed_bytes: int

    @property
    def flops(self) -> int:
        return self.gemm_flops + self.adapter_flops


def micro_batch(model: ModelConfig, plan: Plan, layout: Layout, size: int, *,
                kernel: str = "auto") -> MicroBatch:
    """Costs of a micro-batch of ``size`` images in bf16, where adapters compute by ``kernel`` (`Config.kernel`).

    A module keeps its input for backward exactly if a gradient that needs it is computed: a frozen linear keeps
    nothing, and below the lowest parameter that trains nothing is kept at all. Products are counted as 2 FLOPs a
    multiply-add; backward of one is twice its forward, less what needs no gradient. With ``activation_checkpointing`` a
    block keeps its input and runs forward twice. Mean and deviation of norms, and torch's random states, are left out.

    Source: PyTorch's autograd formulas of the operators that `transformers.ViTForImageClassification` (5.23) runs.
    """
    w, d = _Walk(plan, layout, kernel), model.hidden_size
    rows = size * ((model.image_size // model.patch_size) ** 2 + 1)
    hidden, dropped = BF16 * rows * d, rows * d if model.hidden_dropout_prob else 0  # a mask has a byte an element
    embed = "vit.embeddings.patch_embeddings.projection"
    if w.linear(embed, rows - size):
        w.saved += BF16 * size * model.num_channels * model.image_size ** 2
    w.flows = any(name.startswith("vit.embeddings.") for name in plan.training())
    w.saved += dropped * w.flows
    inner = 0
    for i in range(model.num_hidden_layers):
        before, forward, begun = w.saved, w.forward, w.flows
        _block(w, model, f"vit.layers.{i}", size, rows, dropped)
        if model.activation_checkpointing:
            inner = max(inner, w.saved - before - (hidden if begun else 0))
            w.saved, w.gemm = before + hidden, w.gemm + w.forward - forward
    normed = w.norm("vit.layernorm", rows * d)
    if w.linear("classifier", size):
        w.saved += normed
    labels = layout.parameters["classifier.weight"][0]
    w.saved += size * (FP32 * labels + 8)  # the loss keeps fp32 log-probabilities and int64 labels
    return MicroBatch(w.forward, w.gemm, w.adapters, w.traffic, w.calls + len(plan.trainable), w.saved, inner)


def _block(w: _Walk, model: ModelConfig, path: str, size: int, rows: int, dropped: int) -> None:
    d, f = model.hidden_size, model.intermediate_size
    heads, tokens = model.num_attention_heads, rows // size
    residual = w.flows
    normed, into_block = w.norm(f"{path}.layernorm_before", rows * d), w.flows
    keeps = []
    for name in ("q_proj", "k_proj", "v_proj"):
        w.flows = into_block
        keeps.append(w.linear(f"{path}.attention.{name}", rows))
        residual |= w.flows
    w.saved += normed if any(keeps) else 0  # one storage for the three
    w.flows = residual
    _attention(w, rows * d, size * heads * tokens, tokens, model.attn_implementation == "eager")
    # sdpa's output, kept for its own backward, is the storage that the projection reads; eager makes a copy.
    if w.linear(f"{path}.attention.o_proj", rows) and (model.attn_implementation == "eager" or not residual):
        w.saved += BF16 * rows * d
    _residual(w, rows * d, dropped)
    normed = w.norm(f"{path}.layernorm_after", rows * d)
    if w.linear(f"{path}.mlp.fc1", rows):
        w.saved += normed
    w.elementwise(2 * rows * f, 3 * rows * f)
    w.saved += BF16 * rows * f if w.flows else 0  # GELU's input; its output is fc2's
    if w.linear(f"{path}.mlp.fc2", rows):
        w.saved += BF16 * rows * f
    _residual(w, rows * d, dropped)


def _attention(w: _Walk, hidden: int, queries: int, tokens: int, eager: bool) -> None:
    """``hidden``: elements of q; ``queries``: of all heads."""
    w.product(4 * hidden * tokens, 8 * hidden * tokens if w.flows else 0)
    w.elementwise(4 * hidden, 8 * hidden)
    if eager:
        w.elementwise(10 * queries * tokens, 10 * queries * tokens)  # scores, scaled, softmax in fp32, and back
    if w.flows:
        # eager: q, k, v, the fp32 softmax and its bf16 copy; sdpa: q, k, v, the output, an fp32 log-sum a query.
        w.saved += 3 * BF16 * hidden + (queries * tokens * (FP32 + BF16) if eager else BF16 * hidden + FP32 * queries)


def _residual(w: _Walk, hidden: int, dropped: int) -> None:
    w.elementwise(3 * hidden, 3 * hidden)
    w.saved += dropped if w.flows else 0


class _Walk:
    """Sums over the modules run so far. ``flows``: whether the input of the next one needs a gradient."""

    def __init__(self, plan: Plan, layout: Layout, kernel: str) -> None:
        self.plan, self.layout, self.kernel = plan, layout, kernel
        self.training = plan.training()
        self.flows = False
        self.forward = self.gemm = self.adapters = self.traffic = self.calls = self.saved = 0

    def trains(self, path: str) -> bool:
        return not {f"{path}.weight", f"{path}.bias"}.isdisjoint(self.training)

    def product(self, forward: int, backward: int) -> None:
        self.forward += forward
        self.gemm += forward + backward
        self.calls += 1

    def elementwise(self, forward: int, backward: int) -> None:
        """``forward`` and ``backward``: bf16 elements read and written."""
        self.traffic += BF16 * (forward + (backward if self.flows else 0))

    def norm(self, path: str, hidden: int) -> int:
        """A LayerNorm of ``hidden`` elements; returns the bytes of its output."""
        self.flows |= self.trains(path)
        self.elementwise(2 * hidden, 3 * hidden)
        self.calls += 1
        self.saved += BF16 * hidden if self.flows else 0
        return BF16 * hidden

    def linear(self, path: str, rows: int) -> bool:
        """A linear (or the patch projection) on ``rows``, and its adapter; returns whether it keeps its input."""
        out, *rest = self.layout.parameters[f"{path}.weight"]
        size, weight_trains = rows * math.prod(rest), f"{path}.weight" in self.training
        flops = 2 * size * out
        self.product(flops, flops * (self.flows + weight_trains))
        keeps = self._adapter(path, rows) if path in self.plan.adapters else False
        self.flows |= self.trains(path)
        return keeps or weight_trains

    def _adapter(self, path: str, rows: int) -> bool:
        spec, (outputs, inputs) = self.plan.adapters[path], self.layout.parameters[f"{path}.weight"]
        kind = kind_of(spec)
        leaves = frozenset(leaf for leaf in kind.parameters((outputs, inputs), spec)
                           if f"{path}.{leaf}" in self.training)
        folded = self.kernel == "merged" and f"{path}.weight" not in self.plan.trainable
        cost = kind.cost(spec, rows, inputs, outputs, Needs(self.flows, leaves, folded))
        self.forward += cost.forward_flops
        self.adapters += cost.forward_flops + cost.backward_flops
        self.traffic += BF16 * cost.traffic
        self.calls += cost.calls
        self.saved += BF16 * cost.saved
        self.flows |= bool(leaves)
        return cost.keeps_input


@dataclass(frozen=True)
class Communication:
    """Payload of the collectives of one rank and optimizer step, in bytes, and how many there are."""

    all_reduce: int
    all_gather: int
    reduce_scatter: int
    collectives: int

    def wire_bytes(self, world_size: int) -> float:
        """Bytes that each rank sends when the collectives go around a ring."""
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * (world_size - 1) / world_size


def communication(plan: Plan, layout: Layout, zero: ZeroSettings, accum: int, *,
                  reuse_distance: int = REUSE_DISTANCE) -> Communication:
    """The collectives of an optimizer step of ``accum`` micro-batches; gradients travel in fp32, weights in bf16.

    Source: ZeRO (Rajbhandari et al. 2020, section 7), and DeepSpeed 0.19 where it differs: stage 2 all-reduces its
    buckets in each micro-batch where the paper has one reduce-scatter, and stage 3 keeps what it gathered in forward
    for backward as long as ``reuse_distance`` elements are not passed in between.
    """
    sizes = _sizes(plan, layout)
    n, t = sum(sizes.values()), sum(sizes[name] for name in plan.trainable)
    if zero.stage < 2:
        return Communication(FP32 * t, BF16 * t * zero.stage, 0, math.ceil(t / ENGINE_BUCKET) * (1 + zero.stage))
    buckets = accum * math.ceil(t / min(t, zero.reduce_bucket_size))
    if zero.stage == 2:
        return Communication(FP32 * t * accum, BF16 * t, 0, buckets + 1)
    small = [size for size in sizes.values() if size <= zero.persistence_threshold]
    gathered = n - sum(small)
    again = max(0, gathered - reuse_distance // 2)
    gathers = math.ceil(gathered / PREFETCH_BUCKET) + math.ceil(again / PREFETCH_BUCKET)
    return Communication(0, BF16 * (accum * (gathered + again) + sum(small)), FP32 * t * accum,
                         accum * gathers + len(small) + buckets)


def state_traffic_bytes(plan: Plan, layout: Layout, zero: ZeroSettings, world_size: int, accum: int) -> int:
    """Bytes a rank reads and writes for gradients and optimizer in one step.

    Gradients: each micro-batch's bf16 ones are added into fp32 (10 bytes an element). AdamW on the rank's share: reads
    gradient, master and moments, writes the last three (28), the norm (4), clipping (8), the bf16 weight (6); with
    offload that is the host's.
    """
    t = _trained(plan, layout)
    return 10 * t * accum + (0 if zero.offload_optimizer else 46 * t // (world_size if zero.stage else 1))


def host_traffic_bytes(plan: Plan, layout: Layout, zero: ZeroSettings, world_size: int) -> int:
    """Bytes a rank moves on the host and to it with optimizer offload: gradients down, weights up, AdamW there."""
    return (FP32 + BF16 + 28) * _trained(plan, layout) // world_size if zero.offload_optimizer else 0


def buckets_bytes(plan: Plan, layout: Layout, zero: ZeroSettings) -> int:
    """Bytes beside `budget.predict_bytes` when gradients are reduced: staging copies of a bucket, gathered weights.

    A bucket is flattened and turned into fp32 at stage 0 (6 bytes an element), flattened in fp32 at stage 1, staged in
    bf16, flattened and turned into fp32 at stage 2 (8), put in the order of the ranks in fp32 at stage 3.
    """
    t = _trained(plan, layout)
    bucket = min(t, zero.reduce_bucket_size if zero.stage > 1 else ENGINE_BUCKET)
    return (6, 4, 8, 4)[zero.stage] * bucket


def gathered_bytes(plan: Plan, layout: Layout, zero: ZeroSettings, *, reuse_distance: int = REUSE_DISTANCE) -> int:
    """Bytes of gathered weights that stage 3 keeps between forward and backward."""
    sizes = _sizes(plan, layout).values()
    large = sum(size for size in sizes if size > zero.persistence_threshold)
    return BF16 * min(large, reuse_distance // 2) if zero.stage == 3 else 0


def peak_bytes(plan: Plan, layout: Layout, zero: ZeroSettings, world_size: int, accum: int, saved_bytes: int, *,
               kernel: str = "auto", reuse_distance: int = REUSE_DISTANCE) -> tuple[Bytes, int]:
    """States at the end of backward, and the largest sum of a step on the device, in bytes of one rank.

    Offloaded states are on the host. The sum is largest where backward begins (activations, and with accumulation the
    gradients so far) or where it ends (gradients, buckets): in between one shrinks as the other grows.
    """
    rest, end = (predict_bytes(plan, layout, zero, world_size, after_backward=after, kernel=kernel)
                 for after in (False, True))
    gathered = gathered_bytes(plan, layout, zero, reuse_distance=reuse_distance)

    def on_device(states: Bytes) -> int:
        return states.weights + (states.buffers if zero.stage == 3 else 0) if zero.offload_optimizer else states.total

    begins = on_device(end if accum > 1 else rest) + saved_bytes + gathered
    return end, max(begins, on_device(end) + buckets_bytes(plan, layout, zero))


def _sizes(plan: Plan, layout: Layout) -> Mapping[str, int]:
    return {name: math.prod(shape) for name, shape in plan.parameters(layout).items()}


def _trained(plan: Plan, layout: Layout) -> int:
    sizes = _sizes(plan, layout)
    return sum(sizes[name] for name in plan.trainable)
