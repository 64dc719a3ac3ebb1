"""FLOPs against published figures, activation bytes against torch's allocator, communication against ZeRO's terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from support.kinds import of_kind
from support.plans import full_plan, lora_plan, warmup_plan
from support.runs import config
from torch import nn

from prelora_ds.config.adapters import FAMILIES
from prelora_ds.config.model import ModelConfig
from prelora_ds.config.tree import ZeroSettings
from prelora_ds.core.adapters import KINDS
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.core.selection import with_active
from prelora_ds.cost.flops import (
    Communication,
    buckets_bytes,
    communication,
    gathered_bytes,
    host_traffic_bytes,
    micro_batch,
    overlapped_bytes,
    peak_bytes,
    state_traffic_bytes,
    step_flops,
)
from prelora_ds.model.adapters import activate, attach_adapters
from prelora_ds.model.adapters.lora import lora_linears
from prelora_ds.model.families import find_layout, named_parameters
from prelora_ds.model.vit import build_model

VIT_L = ModelConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
NARROW = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 256}
LONG = {"image_size": 64, "patch_size": 8, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3,
        "intermediate_size": 200}
PHASES = ("full", "warmup", "lora", "bare", "half", "dyna", "cut")


@cache
def layout_of(model_json: str, labels: int) -> Layout:
    with torch.device("meta"):
        return find_layout(build_model(ModelConfig.model_validate_json(model_json), labels), FAMILIES)


def plans(model: ModelConfig, rank: int = 8, labels: int = 10, train_a: bool = True,
          kind: str = "lora") -> tuple[Layout, dict[str, Plan]]:
    layout = layout_of(model.model_dump_json(), labels)
    ranks = {family: {i: rank << i % 2 for i in layers} if labels == 10 else dict.fromkeys(layers, rank)
             for family, layers in layout.targets.items()}
    warmup = warmup_plan(layout, ranks, train_a=train_a)
    if kind != "lora":
        warmup = of_kind(warmup, layout, kind)
    lora = lora_plan(layout, warmup)
    return layout, {"full": full_plan(layout), "warmup": warmup, "lora": lora,
                    "bare": lora_plan(layout, warmup, train_rest=False),
                    "half": lora_plan(layout, warmup, freeze_below=model.num_hidden_layers // 2),
                    "dyna": with_active(lora, layout, frozenset(sorted(lora.adapters)[::2]), cut_backward=False),
                    "cut": with_active(lora, layout, frozenset(sorted(lora.adapters)[-2:]), cut_backward=True)}


@pytest.mark.parametrize(("phase", "rank", "gflop"), [
    ("full", 8, 369.3), ("warmup", 30, 385), ("lora", 8, 254), ("lora", 30, 266), ("lora", 64, 284),
])
def test_flops_of_a_step_of_vit_l(phase: str, rank: int, gflop: float) -> None:
    layout, by_phase = plans(VIT_L, rank, labels=1000)
    cost = micro_batch(VIT_L, by_phase[phase], layout, 2)
    assert cost.flops / 2e9 == pytest.approx(gflop, rel=2e-3)
    assert micro_batch(VIT_L, by_phase["full"], layout, 1).forward_flops / 1e9 == pytest.approx(123.1, rel=1e-3)


def test_the_flops_of_a_step_do_not_depend_on_how_it_is_executed() -> None:
    _, by_phase = plans(ModelConfig.model_validate(NARROW))
    usual = config(model=NARROW, batch=8, micro=4)
    ways = [usual, config("zero3", model=NARROW, batch=8, micro=2),
            config(model={**NARROW, "activation_checkpointing": True}, batch=8, lora={"mode": "merged"})]
    for plan in (by_phase[name] for name in PHASES):
        layout = layout_of(usual.model.model_dump_json(), 10)
        image = micro_batch(usual.model, plan, layout, 1, kernel="branch")
        for way in ways:
            flops = step_flops(way, layout)
            assert flops is not None and flops(plan) == flops(plan) == 8 * image.flops
    other = usual.model_copy(update={"model": usual.model.model_copy(update={"factory": "a:b"})})
    assert step_flops(other, layout) is None


def test_what_the_modes_of_the_lora_linear_compute() -> None:
    """The branch kernel has six skinny products, merged has four, and a frozen A saves one."""
    layout, by_phase = plans(VIT_L, 16, labels=1000)
    _, frozen_a = plans(VIT_L, 16, labels=1000, train_a=False)
    branch = micro_batch(VIT_L, by_phase["lora"], layout, 1).adapter_flops
    merged = micro_batch(VIT_L, by_phase["lora"], layout, 1, kernel="merged").adapter_flops
    assert merged == pytest.approx(branch * 4 / 6)
    assert micro_batch(VIT_L, frozen_a["lora"], layout, 1).adapter_flops == pytest.approx(branch * 5 / 6)


def test_checkpointing_runs_the_blocks_forward_once_more() -> None:
    layout, by_phase = plans(VIT_L, labels=1000)
    plain, again = (micro_batch(VIT_L.model_copy(update={"activation_checkpointing": c}), by_phase["full"], layout, 1)
                    for c in (False, True))
    assert again.flops - plain.flops == pytest.approx(plain.forward_flops, rel=0.01)
    assert again.forward_flops == plain.forward_flops


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("sizes", "batch"), [(NARROW, 4), (LONG, 3), (LONG, 8)])
def test_activation_bytes_are_those_of_the_allocator(sizes: dict, batch: int, attention: str, phase: str) -> None:
    model = ModelConfig(**sizes, attn_implementation=attention)
    layout, by_phase = plans(model)
    predicted = micro_batch(model, by_phase[phase], layout, batch).saved_bytes
    assert predicted == pytest.approx(activation_bytes(model, by_phase[phase], batch), rel=0.01)


@pytest.mark.parametrize("phase", PHASES[1:])
@pytest.mark.parametrize("kernel", ["peft", "merged", "A frozen"])
def test_activation_bytes_of_each_kernel(kernel: str, phase: str) -> None:
    model = ModelConfig(**LONG)
    layout, by_phase = plans(model, train_a=kernel != "A frozen")
    kernel = kernel.replace("A frozen", "branch")
    predicted = micro_batch(model, by_phase[phase], layout, 4, kernel=kernel).saved_bytes
    assert predicted == pytest.approx(activation_bytes(model, by_phase[phase], 4, kernel=kernel), rel=0.01)


@pytest.mark.parametrize("phase", ["warmup", "lora", "half", "dyna"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_activation_bytes_of_each_kind(kind: str, phase: str) -> None:
    model = ModelConfig(**LONG)
    layout, by_phase = plans(model, kind=kind)
    predicted = micro_batch(model, by_phase[phase], layout, 4).saved_bytes
    assert predicted == pytest.approx(activation_bytes(model, by_phase[phase], 4), rel=0.01)


@pytest.mark.parametrize("phase", ["full", "lora"])
def test_activation_bytes_under_checkpointing(phase: str) -> None:
    model = ModelConfig(**LONG, activation_checkpointing=True)
    layout, by_phase = plans(model)
    predicted = micro_batch(model, by_phase[phase], layout, 16)
    assert predicted.saved_bytes == pytest.approx(activation_bytes(model, by_phase[phase], 16), rel=0.03)
    whole = micro_batch(ModelConfig(**LONG), by_phase[phase], layout, 16).saved_bytes
    assert predicted.recomputed_bytes < whole / model.num_hidden_layers


def test_activation_bytes_with_dropout() -> None:
    """On a CPU torch keeps dropout's mask in bf16, on a GPU, for which this is counted, in bytes."""
    model = ModelConfig(**LONG, hidden_dropout_prob=0.1)
    layout, by_phase = plans(model)
    predicted = micro_batch(model, by_phase["full"], layout, 4).saved_bytes
    assert predicted == pytest.approx(activation_bytes(model, by_phase["full"], 4), rel=0.1)


def activation_bytes(model: ModelConfig, plan: Plan, batch: int, *, kernel: str = "branch") -> int:
    """The bytes that torch's allocator hands out in a forward pass and that are still in use at its end."""
    torch.manual_seed(0)
    module = build_model(model, 10)
    layout = find_layout(module, FAMILIES)
    attach_adapters(module, plan, layout, dropout=0.0, kernel=kernel)
    module.to(torch.bfloat16).train()
    for name, p in named_parameters(module).items():
        p.requires_grad_(name in plan.training())
    activate(module, plan, layout)
    if kernel == "merged":
        for linear in lora_linears(module):
            if not linear.get_base_layer().weight.requires_grad:
                linear.keep_fp32_weight()
    module(torch.rand(1, 3, model.image_size, model.image_size).bfloat16())  # what adapters keep is no activation
    pixels, labels = torch.rand(batch, 3, model.image_size, model.image_size), torch.zeros(batch, dtype=torch.long)
    # The engine's bf16 images live as long as something keeps them.
    return allocated(lambda: nn.functional.cross_entropy(module(pixels.bfloat16()).logits.float(), labels))


def allocated(run: Callable[[], object]) -> int:
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        kept = run()
    events = profile.profiler.kineto_results.events()
    del kept
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


# One linear of 64 x 32 with bias, an embedding: 2152 elements; an adapter of rank 4 adds 384.
TINY = Layout({"a.weight": (64, 32), "a.bias": (64,), "embed": (10, 4)}, {"x": {0: "a"}})
FULL = full_plan(TINY)
LORA = lora_plan(TINY, warmup_plan(TINY, {"x": {0: 4}}))
PARTLY = replace(LORA, active=frozenset({"a.lora_B.weight", "embed"}))  # 296 of its 424 elements


@pytest.mark.parametrize(("plan", "zero", "accum", "expected"), [
    (FULL, ZeroSettings(0), 1, Communication(8608, 0, 0, 1)),
    (FULL, ZeroSettings(1), 4, Communication(8608, 4304, 0, 2)),
    (FULL, ZeroSettings(2), 4, Communication(4 * 8608, 4304, 0, 5)),
    (FULL, ZeroSettings(2, reduce_bucket_size=2048), 4, Communication(4 * 8608, 4304, 0, 9)),
    (FULL, ZeroSettings(2, reduce_bucket_size=1000), 1, Communication(8608, 4304, 0, 4)),
    (LORA, ZeroSettings(2), 1, Communication(4 * 424, 2 * 424, 0, 2)),
    # Small parameters are gathered once per step, large ones once per micro-batch; frozen ones too.
    (LORA, ZeroSettings(3, persistence_threshold=64), 2,
     Communication(0, 2 * (2 * 2432 + 104), 2 * 4 * 424, 2 + 2 + 2)),
    # Stage 1 reduces its whole buffer, and weights are gathered whether or not they train now.
    (PARTLY, ZeroSettings(0), 1, Communication(4 * 296, 0, 0, 1)),
    (PARTLY, ZeroSettings(1), 2, Communication(4 * 424, 2 * 424, 0, 2)),
    (PARTLY, ZeroSettings(2, reduce_bucket_size=256), 3, Communication(3 * 4 * 296, 2 * 424, 0, 3 * 2 + 1)),
    (PARTLY, ZeroSettings(3, persistence_threshold=64, reduce_bucket_size=256), 1,
     Communication(0, 2 * 2536, 4 * 296, 1 + 2 + 2)),
])
def test_payloads(plan: Plan, zero: ZeroSettings, accum: int, expected: Communication) -> None:
    assert communication(plan, TINY, zero, accum) == expected


def test_all_buckets_but_the_last_are_sent_during_the_backward_pass() -> None:
    overlap = ZeroSettings(2, overlap_comm=True, reduce_bucket_size=2048)
    for zero, gradients in ((overlap, 2 * 3 * 4 * 2152), (replace(overlap, stage=3), 3 * 4 * 2152)):
        comm = communication(FULL, TINY, zero, 3)
        assert overlapped_bytes(FULL, TINY, zero, comm, 4) == gradients * 3 / 4 * 1 / 2  # there are two buckets
        assert overlapped_bytes(FULL, TINY, replace(zero, overlap_comm=False), comm, 4) == 0
        whole = replace(zero, reduce_bucket_size=None)
        assert overlapped_bytes(FULL, TINY, whole, comm, 4) == 0


def test_stage_3_gathers_again_what_lies_too_far_back() -> None:
    zero = ZeroSettings(3, persistence_threshold=0)
    once, twice, most = (communication(FULL, TINY, zero, 1, reuse_distance=d).all_gather for d in (10000, 0, 1000))
    assert (once, twice, most) == (2 * 2152, 4 * 2152, 2 * (2152 + 1652))
    assert gathered_bytes(FULL, TINY, zero, reuse_distance=1000) == 2 * 500
    assert gathered_bytes(FULL, TINY, ZeroSettings(2)) == 0


def test_a_ring_sends_an_all_reduce_nearly_twice() -> None:
    """ViT-L, 64 ranks: 2.40 GB of fp32 gradients in full, 0.12 GB in LoRA with rank 30."""
    layout, by_phase = plans(VIT_L, 30, labels=1000)
    full, lora = (communication(by_phase[p], layout, ZeroSettings(0), 1).wire_bytes(64) for p in ("full", "lora"))
    assert full / 1e9 == pytest.approx(2.40, abs=0.005)
    assert lora / 1e9 == pytest.approx(0.12, abs=0.005)
    assert Communication(1, 1, 1, 3).wire_bytes(1) == 0


def test_the_optimizer_s_bytes_are_shared_out_from_stage_1_on() -> None:
    assert state_traffic_bytes(FULL, TINY, ZeroSettings(0), 2, 1) == 56 * 2152
    assert state_traffic_bytes(FULL, TINY, ZeroSettings(2), 2, 3) == (30 + 23) * 2152
    assert host_traffic_bytes(FULL, TINY, ZeroSettings(2, offload_optimizer=True), 2) == 17 * 2152
    assert host_traffic_bytes(FULL, TINY, ZeroSettings(2), 2) == 0


def test_an_inactive_parameter_costs_its_norm_its_clipping_and_its_bf16_weight_only() -> None:
    assert state_traffic_bytes(PARTLY, TINY, ZeroSettings(2), 2, 3) == 3 * 10 * 296 + (28 * 296 + 18 * 424) // 2
    assert host_traffic_bytes(PARTLY, TINY, ZeroSettings(2, offload_optimizer=True), 2) == (32 * 296 + 2 * 424) // 2
    assert 4 * buckets_bytes(PARTLY, TINY, ZeroSettings(2, overlap_comm=True)) == \
        5 * buckets_bytes(PARTLY, TINY, ZeroSettings(2))
    assert [buckets_bytes(PARTLY, TINY, ZeroSettings(stage)) for stage in range(4)] == [
        6 * 296, 4 * 424, 8 * 296, 4 * 296]
    assert [buckets_bytes(PARTLY, TINY, ZeroSettings(stage, reduce_bytes=2)) for stage in range(4)] == [
        2 * 296, 6 * 424, 4 * 296, 2 * 296]


def test_the_peak_is_where_backward_begins_or_where_it_ends() -> None:
    zero = ZeroSettings(2)
    end, few = peak_bytes(FULL, TINY, zero, 2, 1, 0)
    assert few == end.total + buckets_bytes(FULL, TINY, zero)
    many = peak_bytes(FULL, TINY, zero, 2, 1, 10**6)[1]
    assert many == end.total - end.gradients + 10**6
    assert peak_bytes(FULL, TINY, zero, 2, 2, 10**6)[1] == many + end.gradients
    offloaded = peak_bytes(FULL, TINY, ZeroSettings(2, offload_optimizer=True), 2, 1, 10**6)[1]
    assert offloaded == end.weights + 10**6
