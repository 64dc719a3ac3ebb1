from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model_state_dict
from support.plans import full_plan, lora_plan, warmup_plan
from torch import nn

from prelora_ds.config.adapters import FAMILIES
from prelora_ds.config.model import ModelConfig
from prelora_ds.core.adapters import AdapterSpec
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.model.adapters import (
    attach_adapters,
    check_adapters,
    effective_weight,
    initial_adapter_value,
)
from prelora_ds.model.adapters.lora import initial, peft_config
from prelora_ds.model.families import ADAPTER_NAME, find_layout, named_parameters
from prelora_ds.model.vit import build_model, logits_of

SIZES = ModelConfig(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    num_hidden_layers=12,
    num_attention_heads=4,
    intermediate_size=64,
)


def vit() -> nn.Module:
    torch.manual_seed(0)
    return build_model(SIZES, 10).eval()


@pytest.fixture(scope="module")
def layout() -> Layout:
    return find_layout(vit(), FAMILIES)


@pytest.fixture(scope="module")
def plan(layout: Layout) -> Plan:
    """A plan whose ranks differ between families and layers, also between layers 1, 10 and 11."""
    ranks = {
        family: {layer: 2 << (i + layer) % 4 for layer in layers}
        for i, (family, layers) in enumerate(layout.targets.items())
    }
    return warmup_plan(layout, ranks, alpha_over_r=0.5, seed=3)


def fill(module: nn.Module, plan: Plan, layout: Layout) -> None:
    """Write initial values into the adapters."""
    leaves = plan.leaves(layout)
    for name, p in named_parameters(module).items():
        if name in leaves:
            p.data = initial_adapter_value(name, tuple(p.shape), plan, leaves).to(p.dtype)


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    leaf = ".".join(name.split(".")[-2:])
    return initial(name, leaf, shape, AdapterSpec("lora", 8, 1.0, seed))


# ---- attach and check


def test_every_planned_rank_and_scaling_is_realised(plan: Plan, layout: Layout) -> None:
    module = attach_adapters(vit(), plan, layout, dropout=0.0)
    assert len({spec.rank for spec in plan.adapters.values()}) == 4
    assert len(plan.adapters) == 6 * 12
    for path, spec in plan.adapters.items():
        linear = module.get_submodule(path)
        assert linear.lora_A[ADAPTER_NAME].weight.shape == (spec.rank, linear.in_features)
        assert linear.lora_B[ADAPTER_NAME].weight.shape == (linear.out_features, spec.rank)
        assert linear.scaling[ADAPTER_NAME] == 0.5
        assert linear.lora_A[ADAPTER_NAME].bias is None


def test_names_and_shapes_after_attaching_are_the_plans(layout: Layout, plan: Plan) -> None:
    for some_plan in (plan, lora_plan(layout, plan, since_step=1)):
        found = named_parameters(attach_adapters(vit(), some_plan, layout, dropout=0.0))
        assert {name: tuple(p.shape) for name, p in found.items()} == some_plan.parameters(layout)


def test_a_plan_without_adapters_leaves_the_module_as_it_is(layout: Layout) -> None:
    module = vit()
    before = list(module.named_parameters())
    assert attach_adapters(module, full_plan(layout), layout, dropout=0.0) is module
    assert [(n, id(p)) for n, p in module.named_parameters()] == [(n, id(p)) for n, p in before]


def test_adapters_on_some_layers_only(layout: Layout) -> None:
    plan = warmup_plan(layout, {"q": {1: 4}, "fc2": {11: 2}})
    found = named_parameters(attach_adapters(vit(), plan, layout, dropout=0.0))
    assert {name for name in found if ".lora_" in name} == {
        "vit.layers.1.attention.q_proj.lora_A.weight",
        "vit.layers.1.attention.q_proj.lora_B.weight",
        "vit.layers.11.mlp.fc2.lora_A.weight",
        "vit.layers.11.mlp.fc2.lora_B.weight",
    }


def test_dropout_is_passed_to_peft(plan: Plan, layout: Layout) -> None:
    path = next(iter(plan.adapters))
    dropped = (
        attach_adapters(vit(), plan, layout, dropout=0.25)
        .get_submodule(path)
        .lora_dropout[ADAPTER_NAME]
    )
    assert isinstance(dropped, nn.Dropout)
    assert dropped.p == 0.25
    assert isinstance(
        attach_adapters(vit(), plan, layout, dropout=0.0)
        .get_submodule(path)
        .lora_dropout[ADAPTER_NAME],
        nn.Identity,
    )


def with_adapters(plan: Plan, **changes: AdapterSpec | None) -> Plan:
    adapters = {
        path: spec for path, spec in (dict(plan.adapters) | changes).items() if spec is not None
    }
    return replace(plan, adapters=adapters)


def test_a_difference_between_model_and_plan_is_found_and_named(plan: Plan, layout: Layout) -> None:
    module = attach_adapters(vit(), plan, layout, dropout=0.0)
    check_adapters(module, plan)
    path, spec = "vit.layers.10.mlp.fc1", plan.adapters["vit.layers.10.mlp.fc1"]
    for other, message in [
        (
            replace(spec, rank=2 * spec.rank),
            rf"{path}: rank {spec.rank} realised, {spec.rank * 2} planned",
        ),
        (replace(spec, scaling=1.0), rf"{path}: scaling 0\.5 realised, 1\.0 planned"),
        (None, f"differ, first at {path}"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            check_adapters(module, with_adapters(plan, **{path: other}))
    with pytest.raises(RuntimeError, match="differ, first at classifier"):
        check_adapters(module, with_adapters(plan, classifier=spec))


def test_a_weight_of_another_rank_than_pefts_own_record_is_found(
    plan: Plan, layout: Layout
) -> None:
    module = attach_adapters(vit(), plan, layout, dropout=0.0)
    path = "vit.layers.1.attention.v_proj"
    linear = module.get_submodule(path)
    linear.lora_A[ADAPTER_NAME] = nn.Linear(linear.in_features, 5, bias=False)
    with pytest.raises(RuntimeError, match=f"{path}: rank 5 realised"):
        check_adapters(module, plan)


@pytest.mark.parametrize("prefix", ["module.", "vit."])
def test_a_plan_with_paths_of_another_wrapping_is_refused(
    plan: Plan, layout: Layout, prefix: str
) -> None:
    """peft would silently use one rank for every layer, or wrap nothing."""
    wrong = replace(plan, adapters={prefix + path: spec for path, spec in plan.adapters.items()})
    with pytest.raises((RuntimeError, ValueError), match=r"differ|not found"):
        attach_adapters(vit(), wrong, layout, dropout=0.0)


def test_a_module_that_peft_wraps_in_addition_to_the_planned_one_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.ema = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})

    layout = find_layout(nn.Sequential(nn.Linear(4, 4)), ("x",), {"x": r"(?P<layer>\d)"})
    plan = warmup_plan(layout, {"x": {0: 2}})
    plan = replace(plan, adapters={"fc": plan.adapters["0"]})
    with pytest.raises(RuntimeError, match=r"first at ema\.fc"):
        attach_adapters(Twice(), plan, layout, dropout=0.0)


def test_peft_sees_the_adapters_as_its_own(plan: Plan, layout: Layout) -> None:
    module = attach_adapters(vit(), plan, layout, dropout=0.0)
    state = get_peft_model_state_dict(module, adapter_name=ADAPTER_NAME)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        name: shape for name, shape in plan.parameters(layout).items() if ".lora_" in name
    }
    config = peft_config(plan.adapters, 0.0)
    assert config.rank_pattern == {path: spec.rank for path, spec in plan.adapters.items()}
    assert config.alpha_pattern == {
        path: spec.scaling * spec.rank for path, spec in plan.adapters.items()
    }
    assert set(config.target_modules) == set(plan.adapters)


# ---- initial values

A_NAME, B_NAME = "vit.layers.0.mlp.fc1.lora_A.weight", "vit.layers.0.mlp.fc1.lora_B.weight"


def test_an_initial_value_depends_only_on_name_and_seed() -> None:
    torch.manual_seed(1)
    first = initial_value(A_NAME, (8, 32), 5)
    torch.manual_seed(2)
    assert torch.equal(initial_value(A_NAME, (8, 32), 5), first)
    assert first.dtype == torch.float32
    for name, seed in (
        (A_NAME, 6),
        (A_NAME.replace("0", "1"), 5),
        (A_NAME.replace("fc1", "fc2"), 5),
    ):
        assert not torch.equal(initial_value(name, (8, 32), seed), first)


def test_an_initial_value_does_not_change_the_global_generator() -> None:
    before = torch.get_rng_state()
    initial_value(A_NAME, (8, 32), 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_b_is_zero_and_a_is_uniform_up_to_one_over_the_root_of_its_inputs() -> None:
    assert torch.equal(initial_value(B_NAME, (64, 8), 5), torch.zeros(64, 8))
    for inputs in (4, 64, 900):
        a, bound = initial_value(A_NAME, (64, inputs), 5), 1 / math.sqrt(inputs)
        assert a.shape == (64, inputs)
        assert a.abs().max() <= bound
        assert a.max() > 0.9 * bound
        assert a.min() < -0.9 * bound
        assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


# ---- outputs


def test_initial_adapters_leave_the_outputs_bitwise_unchanged(plan: Plan, layout: Layout) -> None:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    base = vit().to(torch.bfloat16)
    adapted = attach_adapters(vit(), plan, layout, dropout=0.0).to(torch.bfloat16).eval()
    fill(adapted, plan, layout)
    with torch.no_grad():
        expected, found = logits_of(base(images)), logits_of(adapted(images))
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
        adapted.get_submodule("vit.layers.3.mlp.fc1").lora_B[ADAPTER_NAME].weight.fill_(1.0)
        assert not torch.equal(logits_of(adapted(images)), expected)  # the branch is there


def adapted_linear(rank: int, scaling: float) -> nn.Module:
    holder = nn.Sequential(nn.Linear(24, 16))
    layout = find_layout(holder, ("x",), {"x": r"(?P<layer>\d)"})
    plan = warmup_plan(layout, {"x": {0: rank}}, alpha_over_r=scaling)
    return attach_adapters(holder, plan, layout, dropout=0.0).double()


@pytest.mark.parametrize(("rank", "scaling"), [(1, 0.5), (4, 1.0), (8, 2.0), (16, 0.25)])
def test_the_merged_weight_gives_the_forward_of_base_and_adapter(rank: int, scaling: float) -> None:
    """With small integers neither fp32 nor fp64 rounds, so both sides are exact."""
    generator = torch.Generator().manual_seed(rank)
    module = adapted_linear(rank, scaling)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randint(-8, 9, p.shape, generator=generator))
        linear = module[0]
        inputs = torch.randint(-8, 9, (5, 24), generator=generator).double()
        values = {
            "lora_A.weight": linear.lora_A[ADAPTER_NAME].weight,
            "lora_B.weight": linear.lora_B[ADAPTER_NAME].weight,
        }
        merged = effective_weight(
            linear.base_layer.weight, values, AdapterSpec("lora", rank, scaling, 0)
        )
        assert merged.dtype == torch.float32
        assert not torch.equal(merged.double(), linear.base_layer.weight)
        assert torch.equal(
            nn.functional.linear(inputs, merged.double(), linear.base_layer.bias), module(inputs)
        )


def test_a_merge_of_bf16_values_is_rounded_to_fp32_only() -> None:
    generator = torch.Generator().manual_seed(0)
    base, a, b = (
        torch.randn(*shape, generator=generator).to(torch.bfloat16)
        for shape in ((16, 24), (4, 24), (16, 4))
    )
    exact = base.double() + 0.5 * b.double() @ a.double()
    merged = effective_weight(
        base, {"lora_A.weight": a, "lora_B.weight": b}, AdapterSpec("lora", 4, 0.5, 0)
    )
    assert merged.dtype == torch.float32
    assert (merged.double() - exact).abs().max() < 1e-5
    assert (
        merged.to(torch.bfloat16).double() - exact
    ).abs().max() > 1e-3  # what a merge in BF16 would lose
