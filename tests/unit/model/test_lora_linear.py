"""Our LoRA linear compared with peft's: values, gradients, and what it saves for backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.plans import lora_plan, warmup_plan
from torch import nn

from prelora_ds.config.adapters import FAMILIES
from prelora_ds.config.model import ModelConfig
from prelora_ds.core.phases import PhaseSpec, plan_of
from prelora_ds.core.plan import Plan
from prelora_ds.model.adapters import attach_adapters, refresh_adapters
from prelora_ds.model.adapters.lora import (
    LoraLinear,
    lora_linears,
    peft_config,
)
from prelora_ds.model.families import ADAPTER_NAME, find_layout, named_parameters
from prelora_ds.model.vit import build_model

SIZES = ModelConfig(
    image_size=8,
    patch_size=4,
    hidden_size=16,
    num_hidden_layers=6,
    num_attention_heads=2,
    intermediate_size=32,
    attn_implementation="eager",
)


def adapted(
    *,
    fast: bool,
    rank: int = 4,
    bias: bool = True,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """Return a linear of 12 -> 20 with a random adapter, scaled by 1.5."""
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(12, 20, bias=bias))
    layout = find_layout(holder, ("x",), {"x": r"(?P<layer>0)"})
    plan = warmup_plan(layout, {"x": {0: rank}}, alpha_over_r=1.5)
    attach_adapters(holder, plan, layout, dropout=dropout, kernel="branch" if fast else "peft")
    for name, p in holder.named_parameters():
        p.requires_grad_()
        if "lora" in name:
            nn.init.normal_(p)
    return holder.to(dtype)[0]


def grads(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Return the output, and the gradients of the input and every parameter.

    The loss weighs each output differently.
    """
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    of_parameters = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    return {"x": x.grad, "y": y.detach()} | of_parameters


def frozen(layer: nn.Module) -> nn.Module:
    for p in layer.get_base_layer().parameters():
        p.requires_grad_(False)
    return layer


@pytest.mark.parametrize("shape", [(12,), (7, 12), (3, 5, 12), (2, 3, 5, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base_trains", [True, False])
def test_branch_is_peft_s_lora_in_float64(
    shape: tuple[int, ...], bias: bool, base_trains: bool
) -> None:
    ours, theirs = adapted(fast=True, bias=bias), adapted(fast=False, bias=bias)
    assert type(ours) is LoraLinear and type(theirs) is not LoraLinear
    if not base_trains:
        ours, theirs = frozen(ours), frozen(theirs)
    x = torch.randn(shape, dtype=torch.float64)
    got, expected = grads(ours, x), grads(theirs, x)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (got[name] is None), name
        if value is not None:
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("a_trains", [True, False])
def test_merged_is_peft_s_lora_in_float64(a_trains: bool) -> None:
    ours, theirs = frozen(adapted(fast=True)), frozen(adapted(fast=False))
    for layer in (ours, theirs):
        layer.lora_A[ADAPTER_NAME].weight.requires_grad_(a_trains)
    ours.keep_fp32_weight()
    ours.fp32_weight = (
        ours.get_base_layer().weight.detach().clone()
    )  # in float64, for the comparison
    a, b = ours.lora_weights
    ours.get_base_layer().weight.data = ours.fp32_weight + 1.5 * b.detach() @ a.detach()
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    got, expected = grads(ours, x), grads(theirs, x)
    for name, value in expected.items():
        if value is not None:
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)
        else:
            assert got[name] is None


@pytest.mark.parametrize("merged", [True, False])
def test_gradients_by_gradcheck(merged: bool) -> None:
    """The adapter is checked only for the branch kernel: a merged weight is a constant copy."""
    layer = frozen(adapted(fast=True))
    if merged:
        layer.fp32_weight = layer.get_base_layer().weight.detach().clone()
        for p in layer.lora_weights:
            p.requires_grad_(False)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == (0 if merged else 2)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *trained))


def test_in_bf16_it_is_the_fp32_product_up_to_rounding() -> None:
    layer = frozen(adapted(fast=True, dtype=torch.bfloat16))
    x = torch.randn(64, 12).bfloat16()
    got = grads(layer, x)
    expected = grads(layer.float(), x.float())
    for name, value in expected.items():
        if value is not None:
            assert got[name].dtype is torch.bfloat16  # no tensor leaves the compute dtype
            assert float((got[name].float() - value).norm() / value.norm()) < 2**-7, name


def test_merging_from_an_fp32_base_keeps_what_a_merge_into_bf16_loses() -> None:
    """W is representable in BF16, and B A grows to 1.5e-3 |W| in eight steps."""
    layer = adapted(fast=True, dtype=torch.bfloat16)
    base = torch.randn(20, 12).bfloat16().float()
    layer.keep_fp32_weight()
    layer.fp32_weight.copy_(base)
    a, b = (p.detach() for p in layer.lora_weights)
    b.mul_(1.5e-3 * base.norm() / (1.5 * b.float() @ a.float()).norm() / 8)
    step, in_place = 1.5 * b.float() @ a.float(), base.bfloat16()
    for n in range(1, 9):
        b.copy_(b if n == 1 else b * n / (n - 1))
        layer.refresh_merged_weight()
        in_place += step.bfloat16()
    exact = 1.5 * b.float() @ a.float()
    assert torch.equal(layer.get_base_layer().weight, (base + exact).bfloat16())
    lost, rounded = (
        (in_place - base - exact).norm(),
        (layer.get_base_layer().weight - base - exact).norm(),
    )
    assert (in_place == base).float().mean() > 0.9 and rounded < lost


def test_dropout_runs_peft_s_code_in_training_and_ours_in_evaluation() -> None:
    ours, theirs = adapted(fast=True, dropout=0.5), adapted(fast=False, dropout=0.5)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    torch.manual_seed(1)
    got = grads(ours.train(), x)
    torch.manual_seed(1)
    for name, value in grads(theirs.train(), x).items():
        assert torch.equal(got[name], value), name
    assert "_LoraProduct" in type(ours.eval()(x).grad_fn).__name__
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


def stored(run, *, but: nn.Module) -> list[torch.Size]:
    """Return the shapes of what autograd saves for ``run()``, except the parameters of ``but``."""
    kept = []
    parameters = {p.data_ptr() for p in but.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in parameters:
            kept.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return kept


def test_it_saves_only_what_backward_needs() -> None:
    x, h = torch.Size((3, 5, 12)), torch.Size((3, 5, 4))
    inputs = torch.randn(x, dtype=torch.float64, requires_grad=True)
    layer = frozen(adapted(fast=True))
    assert stored(lambda: layer(inputs), but=layer) == [x, h]
    layer.active = False
    assert stored(lambda: layer(inputs), but=layer) == []
    layer.active = True
    layer.lora_A[ADAPTER_NAME].weight.requires_grad_(False)  # LoRA-FA
    assert stored(lambda: layer(inputs), but=layer) == [h]
    layer.lora_A[ADAPTER_NAME].weight.requires_grad_(True)
    layer.keep_fp32_weight()
    layer.fp32_weight = layer.fp32_weight.double()
    assert stored(lambda: layer(inputs), but=layer) == [x]
    with torch.no_grad():
        assert stored(lambda: layer(inputs), but=layer) == []


def test_an_inactive_adapter_adds_its_branch_passes_the_gradient_on_and_gets_none() -> None:
    layer = frozen(adapted(fast=True))
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    before = grads(layer, x)
    layer.active = False
    after = grads(layer, x)
    assert torch.equal(before["y"], after["y"]) and torch.equal(before["x"], after["x"])
    assert (
        after["lora_A.prelora_adapter.weight"] is None
        and after["lora_B.prelora_adapter.weight"] is None
    )


# ---- the complete ViT


def vit_and_plan(*, train_rest: bool = True, train_a: bool = True) -> tuple[nn.Module, Plan, Plan]:
    torch.manual_seed(0)
    module = build_model(SIZES, 5)
    layout = find_layout(module, FAMILIES)
    ranks = {family: dict.fromkeys(layers, 4) for family, layers in layout.targets.items()}
    warmup = warmup_plan(layout, ranks, train_a=train_a)
    plan = lora_plan(layout, warmup, train_rest=train_rest, since_step=1)
    half = lora_plan(layout, warmup, train_rest=train_rest, since_step=1, freeze_below=3)
    return module, plan, half


def trained_by(module: nn.Module, plan: Plan) -> nn.Module:
    attach_adapters(module, plan, find_layout(build_model(SIZES, 5), FAMILIES), dropout=0.0)
    for name, p in named_parameters(module).items():
        p.requires_grad_(name in plan.trainable)
    return module


def nodes(root: torch.autograd.graph.Node | None) -> list[torch.autograd.graph.Node]:
    seen, todo = [], [root]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.append(node)
            todo += [after for after, _ in node.next_functions]
    return seen


def test_backward_ends_at_the_lowest_active_block() -> None:
    module, _, half = vit_and_plan()
    vit = trained_by(module, half)
    graph_nodes = nodes(vit(torch.randn(2, 3, 8, 8)).logits.grad_fn)
    leaves = {id(node.variable) for node in graph_nodes if hasattr(node, "variable")}
    reached = {name for name, p in named_parameters(vit).items() if id(p) in leaves}
    assert reached == half.trainable
    below = ("vit.embeddings.", "vit.layers.0.", "vit.layers.1.", "vit.layers.2.")
    assert not [name for name in reached if name.startswith(below)]
    assert any(name.startswith("vit.layers.3.layernorm_before") for name in reached)
    # One product for each adapter in the three upper blocks, and none for those below.
    assert sum("_LoraProduct" in type(node).__name__ for node in graph_nodes) == 3 * 6
    lower: list[torch.Tensor] = []
    for i in (0, 1, 2):
        vit.vit.layers[i].register_forward_hook(lambda m, args, out: lower.append(out))
    vit(torch.randn(2, 3, 8, 8))
    assert lower and not any((o[0] if isinstance(o, tuple) else o).requires_grad for o in lower)


def test_if_layernorms_below_still_train_backward_reaches_them() -> None:
    """Freezing only the adapters of the lower blocks would not shorten the backward pass."""
    module, plan, half = vit_and_plan()
    only_adapters = Plan(
        **{
            **vars(half),
            "trainable": plan.trainable
            - {n for n in plan.trainable - half.trainable if ".lora_" in n},
        }
    )
    all_nodes = nodes(trained_by(module, only_adapters)(torch.randn(2, 3, 8, 8)).logits.grad_fn)
    module, _, half = vit_and_plan()
    assert len(nodes(trained_by(module, half)(torch.randn(2, 3, 8, 8)).logits.grad_fn)) < 0.6 * len(
        all_nodes
    )


def test_lora_fa_trains_no_a() -> None:
    module, plan, _ = vit_and_plan(train_a=False)
    assert {name for name in plan.trainable if ".lora_" in name} == {
        f"{path}.lora_B.weight" for path in plan.adapters
    }
    trained_by(module, plan)(torch.randn(2, 3, 8, 8)).logits.sum().backward()
    assert {
        name for name, p in named_parameters(module).items() if p.grad is not None
    } == plan.trainable


def test_a_merged_vit_gives_the_branch_s_outputs_up_to_rounding() -> None:
    module, plan, _ = vit_and_plan()
    vit = trained_by(module, plan).eval()
    for linear in lora_linears(vit):
        linear.lora_weights[1].data.normal_(std=0.1)
    x = torch.randn(2, 3, 8, 8)
    expected = vit(x).logits
    for linear in lora_linears(vit):
        base = linear.get_base_layer().weight.detach().clone()
        linear.keep_fp32_weight()
        linear.fp32_weight.copy_(base)
    refresh_adapters(vit)
    torch.testing.assert_close(vit(x).logits, expected, rtol=1e-4, atol=1e-5)
    waiting = next(lora_linears(vit))
    merged, waiting.active = waiting.get_base_layer().weight.detach().clone(), False
    waiting.fp32_weight.zero_()
    refresh_adapters(vit)
    assert torch.equal(waiting.get_base_layer().weight, merged)
    refresh_adapters(vit, inactive=True)
    assert not torch.equal(waiting.get_base_layer().weight, merged)


def test_peft_saves_and_loads_the_adapters(tmp_path: Path) -> None:
    """peft saves our layers, loads them into its own, and computes the same outputs."""
    torch.manual_seed(0)
    module = build_model(SIZES, 5)
    layout = find_layout(module, FAMILIES)
    plan = warmup_plan(layout, {"q": {0: 4, 5: 2}, "fc2": {3: 8}}, alpha_over_r=0.5)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    config: LoraConfig = peft_config(plan.adapters, 0.0)
    config._register_custom_module({nn.Linear: LoraLinear})
    ours = get_peft_model(module, config, adapter_name=ADAPTER_NAME).eval()
    assert len(list(lora_linears(ours))) == 3
    for linear in lora_linears(ours):
        linear.lora_weights[1].data.normal_()
    x = torch.randn(2, 3, 8, 8)
    expected = ours(x).logits
    ours.save_pretrained(tmp_path)
    plain = build_model(SIZES, 5)
    plain.load_state_dict(weights)
    theirs = PeftModel.from_pretrained(plain, tmp_path / ADAPTER_NAME).eval()
    assert not list(lora_linears(theirs))
    torch.testing.assert_close(theirs(x).logits, expected, rtol=1e-5, atol=1e-6)


def test_freeze_below_in_a_full_plan_freezes_all_earlier_parameters() -> None:
    module = build_model(SIZES, 5)
    layout = find_layout(module, FAMILIES)
    half = plan_of(PhaseSpec("full", freeze_below=3), layout, seed=0)
    assert half.trainable == {
        name
        for name in layout.parameters
        if name.startswith(
            ("classifier", "vit.layernorm", "vit.layers.3.", "vit.layers.4.", "vit.layers.5.")
        )
    }
    with pytest.raises(ValueError, match="the model has no layer 6"):
        plan_of(PhaseSpec("full", freeze_below=6), layout, seed=0)
