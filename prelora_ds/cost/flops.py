"""The cost of a training step of transformers' ViT: FLOPs, bytes of activations, memory traffic and communication.

All terms are counted from shapes, in one walk over the modules in the order of the forward pass; none is fitted. A
"row" is one token of one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prelora_ds.config.model import ModelConfig
from prelora_ds.config.tree import Config, ZeroSettings
from prelora_ds.core.adapters import Needs, kind_of
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.core.quantised import BYTES
from prelora_ds.cost.bytes import BF16, FP32, Bytes, bucket_elements, predict_bytes

REUSE_DISTANCE = 1_000_000_000  # DeepSpeed's default of stage3_max_reuse_distance, in elements
PREFETCH_BUCKET = 50_000_000  # DeepSpeed's default of stage3_prefetch_bucket_size, in elements
ENGINE_BUCKET = 500_000_000  # elements of one all-reduce at stages 0 and 1 (DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE)


@dataclass(frozen=True)
class MicroBatch:
    """The cost of the forward and backward pass of one micro-batch on one rank.

    forward_flops: FLOPs of the forward pass only.
    gemm_flops: FLOPs of all products with weights and in attention.
    adapter_flops: FLOPs of the adapters.
    traffic_bytes: memory traffic of everything else (norms, GELU, residuals, softmax, adapters).
    calls: modules run, and parameter hooks.
    saved_bytes: activations that exist when the backward pass begins.
    recomputed_bytes: activations of one block that activation checkpointing computes again.
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
    """The costs of a micro-batch of ``size`` images in BF16, with adapters that use ``kernel`` (`Config.kernel`).

    A module keeps its input for the backward pass only if a gradient that needs it is computed: a frozen linear keeps
    nothing, and nothing is kept below the lowest parameter that trains. A product counts 2 FLOPs per multiply-add; its
    backward pass costs twice the forward pass, minus the gradients that are not needed. With
    ``activation_checkpointing`` a block keeps only its input and runs its forward pass twice. The mean and deviation of
    norms, and torch's random states, are not counted.

    Source: PyTorch's autograd formulas of the operators that `transformers.ViTForImageClassification` (5.23) runs.
    """
    w = _Walk(plan, layout, kernel)
    d = model.hidden_size
    rows = size * ((model.image_size // model.patch_size) ** 2 + 1)
    hidden = BF16 * rows * d
    dropped = rows * d if model.hidden_dropout_prob else 0  # a mask has one byte per element

    embed = "vit.embeddings.patch_embeddings.projection"
    if w.linear(embed, rows - size):
        w.saved += BF16 * size * model.num_channels * model.image_size ** 2
    w.input_needs_grad = any(name.startswith("vit.embeddings.") for name in plan.training())
    w.saved += dropped * w.input_needs_grad

    recomputed = 0
    for i in range(model.num_hidden_layers):
        saved_before = w.saved
        forward_before = w.forward
        keeps_input = w.input_needs_grad
        _block(w, model, f"vit.layers.{i}", size, rows, dropped)
        if model.activation_checkpointing:
            recomputed = max(recomputed, w.saved - saved_before - (hidden if keeps_input else 0))
            w.saved = saved_before + hidden
            w.gemm += w.forward - forward_before

    normed = w.norm("vit.layernorm", rows * d)
    if w.linear("classifier", size):
        w.saved += normed
    labels = layout.parameters["classifier.weight"][0]
    w.saved += size * (FP32 * labels + 8)  # the loss keeps fp32 log-probabilities and int64 labels
    return MicroBatch(w.forward, w.gemm, w.adapters, w.traffic, w.calls + len(w.training), w.saved,
                      recomputed)


def step_flops(config: Config, layout: Layout) -> Callable[[Plan], int] | None:
    """The FLOPs of an optimizer step under a plan, over all ranks; None if the model is not transformers' ViT.

    They are those of `micro_batch` with the kernel ``branch`` and without activation checkpointing, so that they depend
    neither on the ranks nor on the settings that may change when a run is resumed.
    """
    if config.model.factory is not None:
        return None
    model = config.model.model_copy(update={"activation_checkpointing": False})
    known: dict[Any, int] = {}

    def of_plan(plan: Plan) -> int:
        key = plan.structure(), plan.active
        if key not in known:
            known[key] = micro_batch(model, plan, layout, config.train.global_batch_size, kernel="branch").flops
        return known[key]

    return of_plan


def _block(w: _Walk, model: ModelConfig, path: str, size: int, rows: int, dropped: int) -> None:
    d = model.hidden_size
    f = model.intermediate_size
    heads = model.num_attention_heads
    tokens = rows // size

    residual = w.input_needs_grad
    normed = w.norm(f"{path}.layernorm_before", rows * d)
    into_block = w.input_needs_grad
    keeps = []
    for name in ("q_proj", "k_proj", "v_proj"):
        w.input_needs_grad = into_block
        keeps.append(w.linear(f"{path}.attention.{name}", rows, output_is_kept=True))
        residual |= w.input_needs_grad
    w.saved += normed if any(keeps) else 0  # the three share one storage
    w.input_needs_grad = residual

    _attention(w, rows * d, size * heads * tokens, tokens, model.attn_implementation == "eager")
    # sdpa keeps its output for its own backward pass, and the projection reads the same storage; eager makes a copy.
    if w.linear(f"{path}.attention.o_proj", rows) and (model.attn_implementation == "eager" or not residual):
        w.saved += BF16 * rows * d
    _residual(w, rows * d, dropped)

    normed = w.norm(f"{path}.layernorm_after", rows * d)
    if w.linear(f"{path}.mlp.fc1", rows, output_is_kept=True):
        w.saved += normed
    w.elementwise(2 * rows * f, 3 * rows * f)
    w.saved += BF16 * rows * f if w.input_needs_grad else 0  # the input of GELU; its output is the input of fc2
    if w.linear(f"{path}.mlp.fc2", rows):
        w.saved += BF16 * rows * f
    _residual(w, rows * d, dropped)


def _attention(w: _Walk, hidden: int, queries: int, tokens: int, eager: bool) -> None:
    """Add the attention itself. hidden: elements of q. queries: the number of queries over all heads."""
    w.product(4 * hidden * tokens, 8 * hidden * tokens if w.input_needs_grad else 0)
    w.elementwise(4 * hidden, 8 * hidden)
    if eager:
        w.elementwise(10 * queries * tokens, 10 * queries * tokens)  # scores, scaling, softmax in fp32, and back
    if w.input_needs_grad:
        w.saved += 3 * BF16 * hidden  # q, k and v
        if eager:
            w.saved += queries * tokens * (FP32 + BF16)  # the fp32 softmax and its BF16 copy
        else:
            w.saved += BF16 * hidden + FP32 * queries  # the output, and an fp32 log-sum per query


def _residual(w: _Walk, hidden: int, dropped: int) -> None:
    w.elementwise(3 * hidden, 3 * hidden)
    w.saved += dropped if w.input_needs_grad else 0


class _Walk:
    """The sums over the modules visited so far.

    input_needs_grad: whether the input of the next module needs a gradient.
    """

    def __init__(self, plan: Plan, layout: Layout, kernel: str) -> None:
        self.plan = plan
        self.layout = layout
        self.kernel = kernel
        self.training = plan.training()
        self.quantised = plan.quantised()
        self.input_needs_grad = False
        self.forward = 0
        self.gemm = 0
        self.adapters = 0
        self.traffic = 0
        self.calls = 0
        self.saved = 0

    def trains(self, path: str) -> bool:
        return not {f"{path}.weight", f"{path}.bias"}.isdisjoint(self.training)

    def product(self, forward: int, backward: int) -> None:
        self.forward += forward
        self.gemm += forward + backward
        self.calls += 1

    def elementwise(self, forward: int, backward: int) -> None:
        """Add an elementwise operation. forward, backward: the BF16 elements that it reads and writes."""
        self.traffic += BF16 * (forward + (backward if self.input_needs_grad else 0))

    def norm(self, path: str, hidden: int) -> int:
        """Add a LayerNorm of ``hidden`` elements; returns the bytes of its output."""
        self.input_needs_grad |= self.trains(path)
        self.elementwise(2 * hidden, 3 * hidden)
        self.calls += 1
        self.saved += BF16 * hidden if self.input_needs_grad else 0
        return BF16 * hidden

    def linear(self, path: str, rows: int, *, output_is_kept: bool = False) -> bool:
        """Add a linear (or the patch projection) on ``rows``, with its adapter; returns whether it keeps its input.

        output_is_kept: whether the next module keeps the output anyway if it needs a gradient.
        """
        out, *rest = self.layout.parameters[f"{path}.weight"]
        flops = 2 * rows * math.prod(rest) * out
        weight_trains = f"{path}.weight" in self.training
        if f"{path}.weight" in self.quantised:  # each product makes the BF16 weight from it
            made = BYTES[self.plan.base_dtype]((out, *rest)) + BF16 * math.prod(rest) * out
            self.traffic += made * (1 + self.input_needs_grad)
        self.product(flops, flops * (self.input_needs_grad + weight_trains))
        keeps = self._adapter(path, rows, output_is_kept) if path in self.plan.adapters else False
        self.input_needs_grad |= self.trains(path)
        return keeps or weight_trains

    def _adapter(self, path: str, rows: int, output_is_kept: bool) -> bool:
        spec = self.plan.adapters[path]
        outputs, inputs = self.layout.parameters[f"{path}.weight"]
        kind = kind_of(spec)
        leaves = frozenset(leaf for leaf in kind.parameters((outputs, inputs), spec)
                           if f"{path}.{leaf}" in self.training)
        folded = self.kernel == "merged" and f"{path}.weight" not in self.plan.trainable
        cost = kind.cost(spec, rows, inputs, outputs, Needs(self.input_needs_grad, leaves, folded))
        self.forward += cost.forward_flops
        self.adapters += cost.forward_flops + cost.backward_flops
        self.traffic += BF16 * cost.traffic
        self.calls += cost.calls
        self.saved += BF16 * (cost.saved + (rows * outputs if cost.keeps_output and not output_is_kept else 0))
        self.input_needs_grad |= bool(leaves)
        return cost.keeps_input


@dataclass(frozen=True)
class Communication:
    """The payload in bytes of the collectives of one rank in an optimizer step, and their number."""

    all_reduce: int
    all_gather: int
    reduce_scatter: int
    collectives: int

    def wire_bytes(self, world_size: int) -> float:
        """The bytes that each rank sends if the collectives use a ring."""
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * (world_size - 1) / world_size


def communication(plan: Plan, layout: Layout, zero: ZeroSettings, accum: int, *,
                  reuse_distance: int = REUSE_DISTANCE) -> Communication:
    """The collectives of an optimizer step of ``accum`` micro-batches. Weights are sent in BF16.

    Source: ZeRO (Rajbhandari et al. 2020, section 7), and DeepSpeed 0.19 where it differs: stage 2 all-reduces its
    buckets in every micro-batch, where the paper has one reduce-scatter; and stage 3 keeps the weights gathered in the
    forward pass for the backward pass, unless more than ``reuse_distance`` elements are used in between. Gradients of
    what does not train now are sent only at stage 1, which reduces its whole buffer; stages 1 and 2 gather all weights
    that the optimizer holds.
    """
    sizes = _sizes(plan, layout)
    n = sum(sizes.values())
    t = _held(plan, layout)
    a = _training(plan, layout)
    if zero.stage == 0:
        return Communication(zero.reduce_bytes * a, 0, 0, math.ceil(a / ENGINE_BUCKET))
    if zero.stage == 1:
        return Communication(zero.reduce_bytes * t, BF16 * t, 0, 2 * math.ceil(t / ENGINE_BUCKET))
    buckets = accum * math.ceil(a / bucket_elements(plan, layout, zero))
    if zero.stage == 2:
        return Communication(zero.reduce_bytes * a * accum, BF16 * t, 0, buckets + 1)
    small = [size for size in sizes.values() if size <= zero.persistence_threshold]
    gathered = n - sum(small)
    again = max(0, gathered - reuse_distance // 2)
    gathers = math.ceil(gathered / PREFETCH_BUCKET) + math.ceil(again / PREFETCH_BUCKET)
    return Communication(0, BF16 * (accum * (gathered + again) + sum(small)), zero.reduce_bytes * a * accum,
                         accum * gathers + len(small) + buckets)


def overlapped_bytes(plan: Plan, layout: Layout, zero: ZeroSettings, comm: Communication, world_size: int) -> float:
    """The part of `Communication.wire_bytes` that is sent while the backward pass computes.

    These are the gradients, but for the last bucket of each micro-batch, which is full when that pass is over.
    """
    if not zero.overlap_comm:
        return 0.0
    gradients = Communication(comm.all_reduce, 0, comm.reduce_scatter, 0)
    buckets = math.ceil(_training(plan, layout) / bucket_elements(plan, layout, zero))
    return gradients.wire_bytes(world_size) * (buckets - 1) / buckets


def state_traffic_bytes(plan: Plan, layout: Layout, zero: ZeroSettings, world_size: int, accum: int) -> int:
    """The bytes that a rank reads and writes for gradients and optimizer in one step.

    Adding the BF16 gradients of each micro-batch to the fp32 gradients takes 10 bytes per element. The optimizer works
    on the rank's share: AdamW reads gradient, master and moments and writes the last three (28 bytes per element), the
    norm takes 4, clipping 8, and the BF16 weight 6. The last three are done for everything that the optimizer holds,
    the others for what trains now. With offload the host does the optimizer's part.
    """
    t = _held(plan, layout)
    a = _training(plan, layout)
    gradients = 10 * a * accum
    if zero.offload_optimizer:
        return gradients
    return gradients + (28 * a + 18 * t) // (world_size if zero.stage else 1)


def host_traffic_bytes(plan: Plan, layout: Layout, zero: ZeroSettings, world_size: int) -> int:
    """The bytes that a rank moves on and to the host with optimizer offload: gradients, weights, and AdamW."""
    if not zero.offload_optimizer:
        return 0
    return ((FP32 + 28) * _training(plan, layout) + BF16 * _held(plan, layout)) // world_size


def buckets_bytes(plan: Plan, layout: Layout, zero: ZeroSettings) -> int:
    """The bytes of staging copies of a bucket while gradients are reduced, in addition to `predict_bytes`.

    At stage 0 a bucket is flattened in BF16 (2 bytes per element), at stage 1 in fp32 (4); at stage 2 it is staged and
    flattened in BF16 (4), and with `overlap_comm` the next one is staged at the same time (6). It is then converted if
    it is sent in another type. At stage 3 it is ordered by ranks in the type in which it is sent.
    """
    reduced = _held(plan, layout) if zero.stage == 1 else _training(plan, layout)
    bucket = min(reduced, bucket_elements(plan, layout, zero) if zero.stage > 1 else ENGINE_BUCKET)
    if zero.stage == 3:
        return zero.reduce_bytes * bucket
    flattened = FP32 if zero.stage == 1 else BF16
    staged = 0 if zero.stage < 2 else BF16 * (2 if zero.overlap_comm else 1)
    converted = 0 if zero.reduce_bytes == flattened else zero.reduce_bytes
    return (staged + flattened + converted) * bucket


def gathered_bytes(plan: Plan, layout: Layout, zero: ZeroSettings, *, reuse_distance: int = REUSE_DISTANCE) -> int:
    """The bytes of gathered weights that stage 3 keeps between the forward and the backward pass."""
    sizes = _sizes(plan, layout).values()
    large = sum(size for size in sizes if size > zero.persistence_threshold)
    return BF16 * min(large, reuse_distance // 2) if zero.stage == 3 else 0


def peak_bytes(plan: Plan, layout: Layout, zero: ZeroSettings, world_size: int, accum: int, saved_bytes: int, *,
               kernel: str = "auto", reuse_distance: int = REUSE_DISTANCE) -> tuple[Bytes, int]:
    """The bytes of all states at the end of the backward pass, and the device peak of a step, for one rank.

    Offloaded states are on the host. The peak is where the backward pass begins (activations, and with accumulation
    the gradients so far) or where it ends (gradients, buckets): in between, activations shrink as gradients grow.
    """
    rest = predict_bytes(plan, layout, zero, world_size, after_backward=False, kernel=kernel)
    end = predict_bytes(plan, layout, zero, world_size, after_backward=True, kernel=kernel)
    gathered = gathered_bytes(plan, layout, zero, reuse_distance=reuse_distance)

    def on_device(states: Bytes) -> int:
        if not zero.offload_optimizer:
            return states.total
        return states.weights + (states.buffers if zero.stage == 3 else 0)

    at_start = on_device(end if accum > 1 else rest) + saved_bytes + gathered
    return end, max(at_start, on_device(end) + buckets_bytes(plan, layout, zero))


def _sizes(plan: Plan, layout: Layout) -> Mapping[str, int]:
    return {name: math.prod(shape) for name, shape in plan.in_module(layout).items()}


def _held(plan: Plan, layout: Layout) -> int:
    """The elements that the optimizer holds."""
    sizes = _sizes(plan, layout)
    return sum(sizes[name] for name in plan.trainable)


def _training(plan: Plan, layout: Layout) -> int:
    """The elements that train now."""
    sizes = _sizes(plan, layout)
    return sum(sizes[name] for name in plan.training())
