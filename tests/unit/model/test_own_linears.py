"""The linears of the kinds of adapters compared with peft's: values, gradients, first values, and the folded weight."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lokr.layer import factorization
from support.kinds import of_kind
from support.plans import warmup_plan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prelora_ds.config.adapters import FAMILIES
from prelora_ds.config.model import ModelConfig
from prelora_ds.core.adapters import IA3, KINDS, AdapterSpec, Dora, Needs, Vera
from prelora_ds.core.adapters.lokr import nearest_factors
from prelora_ds.core.adapters.refused import REFUSED
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.model.adapters import (
    HALVES,
    attach_adapters,
    check_adapters,
    check_names,
    effective_bias,
    effective_weight,
    half_of,
    initial_adapter_value,
    linear,
    refresh_adapters,
)
from prelora_ds.model.adapters.vera import _factor, drawn_pair
from prelora_ds.model.families import find_layout, named_parameters
from prelora_ds.model.vit import build_model, logits_of

OWN = tuple(kind for kind in KINDS if kind != "lora")  # test_lora_linear.py and test_adapters.py test lora
LINEARS = [*((kind, 4) for kind in OWN), ("lokr", 2), ("miss", 5)]  # W2 as two factors; 5 does not divide 12 inputs
SIZES = ModelConfig(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                    intermediate_size=64)


def adapted(kind: str, rank: int = 4, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a linear of 12 -> 20 with a random adapter, scaled by 1.5 if the kind has a scaling."""
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(12, 20, bias=bias))
    layout = find_layout(holder, ("x",), {"x": r"(?P<layer>0)"})
    plan = one_adapter(layout, kind, rank)
    attach_adapters(holder, plan, layout, dropout=0.0)
    for name, p in holder.named_parameters():
        p.requires_grad_()
        if "base_layer" not in name:
            nn.init.uniform_(p, 0.5, 1.5) if name.endswith(Dora.M) else nn.init.normal_(p)
    return holder.to(dtype)[0]


def one_adapter(layout: Layout, kind: str, rank: int = 4) -> Plan:
    return of_kind(warmup_plan(layout, {"x": {0: rank}}, seed=3), layout, kind, scaling=1.5)


def peft_of(ours: nn.Module, kind: str) -> nn.Module:
    """Return peft's linear with the same values.

    VeRA's factor k is in peft's B, and not in b as in an export, so that the gradients of b are the same.
    peft's linears know nothing of AdaLoRA's regulariser.
    """
    if kind == "adalora":
        ours.pull = 0.0
    base = ours.base_layer
    linear = nn.Linear(12, 20, bias=base.bias is not None)
    values = {f"0.{leaf}": ours.get_parameter(leaf).detach() for leaf in ours.leaf_names} | {"0.weight": base.weight}
    config, adapters = half_of(kind).in_peft({"0": ours.spec}, values, 0.0)
    if kind == "vera":
        config = VeraConfig(r=4, target_modules=["0"])
    model = get_peft_model(nn.Sequential(linear), config).double()
    theirs = model.base_model.model[0]
    theirs.get_base_layer().load_state_dict(base.state_dict())
    if kind != "vera":
        assert not set_peft_model_state_dict(model, adapters).unexpected_keys
    else:
        with torch.no_grad():
            a, b = drawn_pair(3, 4, 12, 20)
            theirs.vera_A["default"].copy_(a.t().double())
            theirs.vera_B["default"].copy_(b.double() * _factor(ours.spec, 12))
            theirs.vera_lambda_b["default"].copy_(ours.get_parameter(Vera.B))
            theirs.vera_lambda_d["default"].copy_(ours.get_parameter(Vera.D))
    for p in theirs.parameters():
        p.requires_grad_()
    return theirs


def grads(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    of_parameters = {name.replace(".default", "").replace("ia3_l", IA3.GAIN): p.grad
                     for name, p in layer.named_parameters() if "ranknum" not in name}
    return {"x": x.grad, "y": y.detach()} | of_parameters


@pytest.mark.parametrize(("kind", "rank"), LINEARS)
@pytest.mark.parametrize("shape", [(12,), (7, 12), (3, 5, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base_trains", [True, False])
def test_outputs_and_gradients_are_peft_s_in_float64(kind: str, rank: int, shape: tuple[int, ...], bias: bool,
                                                     base_trains: bool) -> None:
    ours = adapted(kind, rank, bias=bias)
    theirs = peft_of(ours, kind)
    for layer in (ours.base_layer, theirs.get_base_layer()):
        layer.requires_grad_(base_trains)
    x = torch.randn(shape, dtype=torch.float64)
    got, expected = grads(ours, x), grads(theirs, x)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (got[name] is None), name
        if value is not None:
            torch.testing.assert_close(got[name].view_as(value), value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("active", [True, False])
def test_a_kind_costs_the_products_that_it_computes(kind: str, needs_x: bool, active: bool) -> None:
    """With many rows, because what depends on the weights only is not counted."""
    layer = adapted(kind, dtype=torch.float32)
    layer.base_layer.requires_grad_(False)
    layer.active = active
    x = torch.randn(4000, 12, requires_grad=needs_x)
    layer(x)  # dora computes its norms
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, out_shape=None, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:  # torch does not count addmm_ by itself
        y = layer(x)
        if y.requires_grad:
            y.sum().backward()
    own = 2 * 12 * 20 * len(x) * (1 + needs_x)  # of the linear itself
    leaves = frozenset(layer.leaf_names) if active else frozenset()
    cost = KINDS[kind].cost(layer.spec, len(x), 12, 20, Needs(needs_x, leaves, folded=False))
    assert counted.get_total_flops() - own == pytest.approx(cost.forward_flops + cost.backward_flops, rel=0.02, abs=0)


@pytest.mark.parametrize("kind", OWN)
def test_an_inactive_adapter_has_the_same_output_and_gets_no_gradient(kind: str) -> None:
    layer = adapted(kind)
    layer.base_layer.requires_grad_(False)
    x = torch.randn(3, 12, dtype=torch.float64)
    active = grads(layer, x)
    layer.zero_grad()
    layer.active = False
    idle = grads(layer, x)
    assert torch.equal(idle["y"], active["y"]) and torch.equal(idle["x"], active["x"])
    assert all(value is None for name, value in idle.items() if name not in ("x", "y"))


@pytest.mark.parametrize(("kind", "rank"), LINEARS)
def test_the_folded_weight_gives_the_forward_pass(kind: str, rank: int) -> None:
    """In float64, so that dora's norms are not rounded; vera folds in fp32. test_adapters.py has this test for lora."""
    layer = adapted(kind, rank)
    x = torch.randn(5, 12, dtype=torch.float64)
    values = {leaf: layer.get_parameter(leaf) for leaf in KINDS[kind].parameters((20, 12), layer.spec)}
    weight = effective_weight(layer.base_layer.weight, values, layer.spec).double()
    bias = effective_bias(layer.base_layer.bias, values, layer.spec).double()
    unchanged = torch.allclose(bias, layer.base_layer.bias, rtol=1e-6)
    assert unchanged != KINDS[kind].can.changes_bias
    expected = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert (weight - layer.base_layer.weight).norm() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_new_adapter_leaves_the_outputs_bitwise(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = build_model(SIZES, 10).to(dtype).eval()
    layout = find_layout(base, FAMILIES)
    ranks = {family: dict.fromkeys(layers, 4) for family, layers in layout.targets.items()}
    plan = of_kind(warmup_plan(layout, ranks), layout, kind)
    torch.manual_seed(0)
    module = attach_adapters(build_model(SIZES, 10), plan, layout, dropout=0.0).to(dtype).eval()
    check_adapters(module, plan)
    check_names(module, plan, layout)
    leaves, parameters = plan.leaves(layout), named_parameters(module)
    with torch.no_grad():
        for name, (path, _) in leaves.items():
            weight = parameters[f"{path}.weight"].data
            parameters[name].copy_(initial_adapter_value(name, tuple(parameters[name].shape), plan, leaves, weight))
        refresh_adapters(module)
        images = torch.randn(4, 3, 16, 16).to(dtype)
        expected, found = logits_of(base(images)), logits_of(module(images))
        assert torch.equal(found, expected)
        for name in leaves:
            parameters[name].add_(torch.randn_like(parameters[name]), alpha=0.3)
        refresh_adapters(module)
        assert not torch.allclose(logits_of(module(images)), expected, atol=1e-3)  # the adapters are there


def test_dora_computes_its_norms_once_until_the_weights_change() -> None:
    layer = adapted("dora")
    x = torch.randn(3, 12, dtype=torch.float64)
    before = layer(x)
    norm = layer.norm
    assert norm is not None and layer.besides_leaves() == [norm]
    layer(x)
    assert layer.norm is norm
    with torch.no_grad():
        layer.get_parameter(Dora.B).mul_(2)
    layer.refresh()
    assert layer.norm is None and not torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dora_in_blocks_of_rows_is_dora_in_one(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 12, dtype=dtype)
    whole = grads(adapted("dora", dtype=dtype), x)
    monkeypatch.setattr(linear, "BLOCK", 60)  # 3 rows of 20 outputs, or 5 of 12 inputs
    assert [len(part) for (part,) in linear.blocks_of_rows(torch.zeros(20, 17))] == [3, 3, 3, 3, 3, 3, 2]
    got = grads(adapted("dora", dtype=dtype), x)
    assert got.keys() == whole.keys()
    for name, value in whole.items():
        if name.endswith(("bias", Dora.M)):  # sums over rows, in another order
            torch.testing.assert_close(got[name], value)
        else:
            assert torch.equal(got[name], value), name


def test_dora_keeps_a_row_of_zeros_finite() -> None:
    layer = adapted("dora")
    with torch.no_grad():
        for leaf in (layer.base_layer.weight, layer.get_parameter(Dora.B), layer.get_parameter(Dora.M)):
            leaf[3] = 0
    got = grads(layer, torch.randn(4, 12, dtype=torch.float64))
    assert all(value is None or torch.isfinite(value).all() for value in got.values())
    assert torch.equal(got["y"][:, 3], layer.base_layer.bias[3].detach().expand(4))


def test_in_bf16_they_are_the_fp32_product_up_to_rounding() -> None:
    for kind in OWN:
        layer = adapted(kind, dtype=torch.bfloat16)
        layer.base_layer.requires_grad_(False)
        x = torch.randn(64, 12).bfloat16()
        got = grads(layer, x)
        layer.refresh()
        layer.zero_grad()
        expected = grads(layer.float(), x.float())
        for name, value in expected.items():
            if value is not None:
                assert got[name].dtype is torch.bfloat16, (kind, name)
                assert float((got[name].float() - value).norm() / value.norm()) < 2**-6, (kind, name)


def test_adalora_adds_the_gradient_of_the_regulariser_that_peft_adds_to_the_loss() -> None:
    layer = adapted("adalora")
    x = torch.randn(7, 12, dtype=torch.float64)
    assert layer.pull == 0.5 / 2  # the default, over one A and one B
    layer.micro_batches = 4
    found = grads(layer, x)
    layer.zero_grad()
    layer.pull = 0.0
    expected = grads(layer, x)
    layer.zero_grad()
    a, b = layer.lora_A, layer.lora_B
    excesses = [m - torch.eye(4, dtype=m.dtype) for m in (a @ a.T, b.T @ b)]
    (0.5 / 2 / 4 * sum(torch.norm(excess, p="fro") for excess in excesses)).backward()
    for name, factor in (("lora_A", a), ("lora_B", b)):
        torch.testing.assert_close(found[name], expected.pop(name) + factor.grad, rtol=1e-10, atol=1e-12)
        assert factor.grad.norm() > 0.01
    assert all(torch.equal(found[name], value) for name, value in expected.items() if value is not None)


def test_vera_shares_one_pair_whose_first_rows_do_not_depend_on_their_number() -> None:
    small, large = drawn_pair(5, 8, 100, 300), drawn_pair(5, 8, 1000, 700)
    assert torch.equal(small[0], large[0][:100]) and torch.equal(small[1], large[1][:300])
    assert not torch.equal(small[0][:100], small[1][:100])
    assert not torch.equal(drawn_pair(6, 8, 100, 300)[0], small[0])
    assert all(-1 <= part.min() < -0.9 and 0.9 < part.max() <= 1 for part in map(torch.Tensor.float, large))

    module = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 16))
    layout = find_layout(module, ("x",), {"x": r"(?P<layer>\d)"})
    plan = of_kind(warmup_plan(layout, {"x": {0: 4, 1: 4}}), layout, "vera")
    attach_adapters(module, plan, layout, dropout=0.0)
    before = torch.get_rng_state()
    refresh_adapters(module)
    assert torch.equal(torch.get_rng_state(), before)
    held = {t.untyped_storage()._cdata: t.nbytes for linear in module for t in linear.besides_leaves()}
    linears = [((20, 12), plan.adapters["0"]), ((16, 20), plan.adapters["1"])]
    assert sum(held.values()) == KINDS["vera"].bytes_besides_leaves(linears)
    assert not list(module.buffers())


def test_another_spec_than_the_plan_s_is_found() -> None:
    module = nn.Sequential(nn.Linear(12, 20))
    layout = find_layout(module, ("x",), {"x": r"(?P<layer>\d)"})
    plan = one_adapter(layout, "dora")
    attach_adapters(module, plan, layout, dropout=0.0)
    with pytest.raises(RuntimeError, match=r"0: AdapterSpec.*realised"):
        check_adapters(module, Plan("warmup", plan.trainable, {"0": AdapterSpec("dora", 4, 1.0, 3)}))
    with pytest.raises(RuntimeError, match="differ, first at 0"):
        check_adapters(module, Plan("warmup", plan.trainable, {"0": AdapterSpec("vera", 4, 1.5, 3)}))


def test_every_kind_has_both_halves() -> None:
    assert KINDS.keys() == HALVES.keys()


def test_every_kind_of_peft_is_offered_or_refused_by_name() -> None:
    """The kinds that peft registers, and the first values and variants of its LoRA."""
    from peft.utils.peft_types import PeftType

    registered = {kind.value.lower() for kind in PeftType}
    assert registered - KINDS.keys() - REFUSED.keys() == set()
    assert not KINDS.keys() & REFUSED.keys()


def test_lokr_has_the_factors_of_peft_s() -> None:
    assert all(nearest_factors(size) == factorization(size) for size in range(1, 4200))


def test_a_gaussian_a_has_the_deviation_of_peft_s() -> None:
    shape = (8, 4000)
    found = half_of("lora").initial("x.lora_A.weight", "lora_A.weight", shape,
                                    AdapterSpec("lora", 8, 1.0, 0, {"init": "gaussian"}), 0, None)
    linear = get_peft_model(nn.Sequential(nn.Linear(4000, 4)), LoraConfig(
        r=8, target_modules=["0"], init_lora_weights="gaussian")).base_model.model[0]
    assert found.std().item() == pytest.approx(linear.lora_A["default"].weight.std().item(), rel=0.03)
    assert found.abs().max() > 3 / 8  # no uniform distribution of this deviation has such values


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_with_what_is_exported_for_it(kind: str, tmp_path: object) -> None:
    torch.manual_seed(0)
    base = build_model(SIZES, 10).eval()
    layout = find_layout(base, FAMILIES)
    ranks = {family: {layer: 4 + 4 * layer for layer in layers} for family, layers in layout.targets.items()}
    plan = of_kind(warmup_plan(layout, ranks, seed=7), layout, kind)
    values = {name: torch.randn(shape) * 0.2 for name, shape in plan.parameters(layout).items()}
    values |= {name: p.detach().clone() for name, p in base.named_parameters()}
    config, adapters = half_of(kind).in_peft(plan.adapters, values, 0.0)
    model = get_peft_model(base, config)
    loaded = set_peft_model_state_dict(model, adapters)
    assert not loaded.unexpected_keys
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    torch.manual_seed(0)
    opened = PeftModel.from_pretrained(build_model(SIZES, 10), str(tmp_path)).eval()

    plain = build_model(SIZES, 10).eval()
    by_path: dict[str, dict[str, torch.Tensor]] = {}
    for name, (path, leaf) in plan.leaves(layout).items():
        by_path.setdefault(path, {})[leaf] = values[name]
    state = {name: values[name] for name in layout.parameters}
    state |= {f"{path}.weight": effective_weight(values[f"{path}.weight"], leaves, plan.adapters[path])
              for path, leaves in by_path.items()}
    state |= {f"{path}.bias": effective_bias(values[f"{path}.bias"], leaves, plan.adapters[path])
              for path, leaves in by_path.items()}
    plain.load_state_dict(state)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected, found = logits_of(plain(images)), logits_of(opened(images))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
