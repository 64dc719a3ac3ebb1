from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.core.phases import full_plan, lora_plan, warmup_plan
from prelora_ds.core.plan import AdapterSpec, Layout, Phase, Plan

LAYOUT = Layout(
    parameters={"embed": (1, 5, 8), "block.0.q.weight": (8, 8), "block.0.q.bias": (8,), "block.0.fc.weight": (16, 8),
                "block.0.norm.weight": (8,), "block.1.q.weight": (8, 8), "block.1.q.bias": (8,),
                "block.1.fc.weight": (16, 8), "head.weight": (3, 8), "head.bias": (3,)},
    targets={"q": {0: "block.0.q", 1: "block.1.q"}, "fc": {0: "block.0.fc", 1: "block.1.fc"}},
)
RANKS = {"q": {0: 2, 1: 4}, "fc": {0: 8, 1: 2}}
ADAPTERS = {"block.0.q.lora_A.weight", "block.0.q.lora_B.weight", "block.1.q.lora_A.weight", "block.1.q.lora_B.weight",
            "block.0.fc.lora_A.weight", "block.0.fc.lora_B.weight", "block.1.fc.lora_A.weight",
            "block.1.fc.lora_B.weight"}
REST = {"embed", "block.0.norm.weight", "head.weight", "head.bias"}
FULL = full_plan(LAYOUT, init_seed=7)
WARMUP = warmup_plan(LAYOUT, RANKS, alpha_over_r=0.5, init_seed=7, since_step=30)
LORA = lora_plan(LAYOUT, WARMUP, train_rest=True, since_step=60)
BARE_LORA = lora_plan(LAYOUT, WARMUP, train_rest=False, since_step=60)

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
PLANS = st.builds(
    Plan, phase=st.sampled_from(Phase), trainable=st.frozensets(names), adapter=st.none() | st.just("lora"),
    adapters=st.dictionaries(names, st.builds(AdapterSpec, st.integers(1, 4096), st.floats(1e-3, 1e6))),
    active=st.frozensets(names), init_seed=st.integers(0, 2**63), cycle=st.integers(0, 99),
    since_step=st.integers(0, 10**9))


def test_layout_lists_the_modules_family_by_family() -> None:
    assert LAYOUT.modules() == ("block.0.q", "block.1.q", "block.0.fc", "block.1.fc")


def test_adapter_shapes_are_rank_by_in_and_out_by_rank() -> None:
    assert LAYOUT.adapter_shapes("block.0.fc", 4) == {"block.0.fc.lora_A.weight": (4, 8),
                                                      "block.0.fc.lora_B.weight": (16, 4)}


def test_full_trains_everything_without_adapters() -> None:
    assert FULL.phase is Phase.FULL
    assert FULL.trainable == set(LAYOUT.parameters)
    assert (FULL.adapter, FULL.adapters, FULL.active, FULL.since_step, FULL.cycle) == (None, {}, frozenset(), 0, 0)
    assert FULL.parameters(LAYOUT) == LAYOUT.parameters


def test_warmup_trains_everything_and_the_adapters() -> None:
    assert WARMUP.phase is Phase.WARMUP
    assert WARMUP.trainable == set(LAYOUT.parameters) | ADAPTERS
    assert WARMUP.active == set(LAYOUT.modules())
    assert (WARMUP.adapter, WARMUP.init_seed, WARMUP.since_step) == ("lora", 7, 30)


def test_each_module_has_its_own_rank_and_all_one_scaling() -> None:
    assert {module: spec.rank for module, spec in WARMUP.adapters.items()} == {
        "block.0.q": 2, "block.1.q": 4, "block.0.fc": 8, "block.1.fc": 2}
    assert {spec.scaling for spec in WARMUP.adapters.values()} == {0.5}


def test_lora_trains_the_adapters_and_what_is_no_adapted_linear() -> None:
    assert LORA.phase is Phase.LORA
    assert LORA.trainable == ADAPTERS | REST


def test_the_bias_of_an_adapted_linear_is_frozen_with_its_weight() -> None:
    for plan in (LORA, BARE_LORA):
        assert not plan.trainable & {"block.0.q.weight", "block.0.q.bias", "block.1.q.bias", "block.0.fc.weight"}


def test_without_train_rest_the_adapters_train_alone() -> None:
    assert BARE_LORA.trainable == ADAPTERS


def test_a_linear_without_adapter_goes_on_training_in_lora() -> None:
    warmup = warmup_plan(LAYOUT, {"q": {0: 2}}, alpha_over_r=1.0, init_seed=0, since_step=0)
    lora = lora_plan(LAYOUT, warmup, train_rest=True, since_step=1)
    assert set(LAYOUT.parameters) - lora.trainable == {"block.0.q.weight", "block.0.q.bias"}


def test_lora_keeps_the_adapters_of_the_warmup() -> None:
    assert (LORA.adapter, LORA.adapters, LORA.active, LORA.init_seed, LORA.cycle) == (
        WARMUP.adapter, WARMUP.adapters, WARMUP.active, WARMUP.init_seed, WARMUP.cycle)
    assert LORA.parameters(LAYOUT) == WARMUP.parameters(LAYOUT)
    assert LORA.since_step == 60


def test_parameters_are_base_first_then_both_factors_of_each_adapter() -> None:
    shapes = WARMUP.parameters(LAYOUT)
    assert list(shapes)[:len(LAYOUT.parameters)] == list(LAYOUT.parameters)
    assert {n: s for n, s in shapes.items() if n not in LAYOUT.parameters} == {
        "block.0.q.lora_A.weight": (2, 8), "block.0.q.lora_B.weight": (8, 2),
        "block.1.q.lora_A.weight": (4, 8), "block.1.q.lora_B.weight": (8, 4),
        "block.0.fc.lora_A.weight": (8, 8), "block.0.fc.lora_B.weight": (16, 8),
        "block.1.fc.lora_A.weight": (2, 8), "block.1.fc.lora_B.weight": (16, 2)}


@pytest.mark.parametrize("plan", [FULL, WARMUP, LORA, BARE_LORA])
def test_what_trains_exists(plan: Plan) -> None:
    assert plan.trainable <= plan.parameters(LAYOUT).keys()


@pytest.mark.parametrize("plan", [FULL, WARMUP, LORA, BARE_LORA])
def test_plans_of_the_phases_round_trip_json(plan: Plan) -> None:
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert isinstance(again.phase, Phase)
    assert isinstance(again.trainable, frozenset)


@given(PLANS)
def test_any_plan_round_trips_json_to_the_same_text(plan: Plan) -> None:
    text = json.dumps(plan.to_json())
    again = Plan.from_json(json.loads(text))
    assert again == plan
    assert json.dumps(again.to_json()) == text


def test_json_does_not_hang_on_the_order_of_sets() -> None:
    assert FULL.to_json()["trainable"] == sorted(LAYOUT.parameters)
    assert LORA.to_json()["active"] == sorted(LAYOUT.modules())
