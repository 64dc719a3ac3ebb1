from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import full_plan, lora_plan, warmup_plan

from prelora_ds.core.adapters import AdapterSpec
from prelora_ds.core.codec import to_json
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import Adapters, PhaseSpec, needed_in_fp32, plan_of
from prelora_ds.core.plan import Plan
from prelora_ds.core.rank_rules.uniform import UniformRank

LAYOUT = Layout(
    parameters={"embed": (1, 5, 8), "block.0.q.weight": (8, 8), "block.0.q.bias": (8,), "block.0.fc.weight": (16, 8),
                "block.0.norm.weight": (8,), "block.1.q.weight": (8, 8), "block.1.q.bias": (8,),
                "block.1.fc.weight": (16, 8), "head.weight": (3, 8), "head.bias": (3,)},
    targets={"q": {0: "block.0.q", 1: "block.1.q"}, "fc": {0: "block.0.fc", 1: "block.1.fc"}},
    blocks={"block.0.": 0, "block.1.": 1},
)
RANKS = {"q": {0: 2, 1: 4}, "fc": {0: 8, 1: 2}}
ADAPTERS = {"block.0.q.lora_A.weight", "block.0.q.lora_B.weight", "block.1.q.lora_A.weight", "block.1.q.lora_B.weight",
            "block.0.fc.lora_A.weight", "block.0.fc.lora_B.weight", "block.1.fc.lora_A.weight",
            "block.1.fc.lora_B.weight"}
REST = {"embed", "block.0.norm.weight", "head.weight", "head.bias"}
FULL = full_plan(LAYOUT)
WARMUP = warmup_plan(LAYOUT, RANKS, alpha_over_r=0.5, seed=7, since_step=30)
LORA = lora_plan(LAYOUT, WARMUP, since_step=60)
BARE_LORA = lora_plan(LAYOUT, WARMUP, train_rest=False, since_step=60)

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
PLANS = st.builds(
    Plan, phase=names, trainable=st.frozensets(names),
    adapters=st.dictionaries(names, st.builds(
        AdapterSpec, st.just("lora"), st.none() | st.integers(1, 4096), st.floats(1e-3, 1e6), st.integers(0, 2**63),
        st.dictionaries(names, st.booleans() | st.integers() | names))),
    lr_scale=st.dictionaries(names, st.floats(1e-3, 1e3)), active=st.none() | st.frozensets(names),
    since_step=st.integers(0, 10**9), cycle=st.integers(0, 99))


def test_layout_lists_the_modules_family_by_family() -> None:
    assert LAYOUT.modules() == ("block.0.q", "block.1.q", "block.0.fc", "block.1.fc")


def test_full_trains_everything_without_adapters() -> None:
    assert FULL.phase == "full"
    assert FULL.trainable == FULL.training() == set(LAYOUT.parameters)
    assert (FULL.adapters, FULL.active, FULL.since_step, FULL.cycle) == ({}, None, 0, 0)
    assert FULL.parameters(LAYOUT) == LAYOUT.parameters


def test_warmup_trains_everything_and_the_adapters() -> None:
    assert WARMUP.phase == "warmup"
    assert WARMUP.trainable == set(LAYOUT.parameters) | ADAPTERS
    assert WARMUP.training() == WARMUP.trainable
    assert {(spec.kind, spec.seed) for spec in WARMUP.adapters.values()} == {("lora", 7)}
    assert WARMUP.since_step == 30


def test_each_module_has_its_own_rank_and_all_one_scaling() -> None:
    assert {module: spec.rank for module, spec in WARMUP.adapters.items()} == {
        "block.0.q": 2, "block.1.q": 4, "block.0.fc": 8, "block.1.fc": 2}
    assert {spec.scaling for spec in WARMUP.adapters.values()} == {0.5}


def test_lora_trains_the_adapters_and_what_is_no_adapted_linear() -> None:
    assert LORA.phase == "lora"
    assert LORA.trainable == ADAPTERS | REST


def test_the_bias_of_an_adapted_linear_is_frozen_with_its_weight() -> None:
    for plan in (LORA, BARE_LORA):
        assert not plan.trainable & {"block.0.q.weight", "block.0.q.bias", "block.1.q.bias", "block.0.fc.weight"}


def test_without_train_rest_the_adapters_train_alone() -> None:
    assert BARE_LORA.trainable == ADAPTERS


def test_a_linear_without_adapter_goes_on_training_in_lora() -> None:
    warmup = warmup_plan(LAYOUT, {"q": {0: 2}})
    lora = lora_plan(LAYOUT, warmup, since_step=1)
    assert set(LAYOUT.parameters) - lora.trainable == {"block.0.q.weight", "block.0.q.bias"}


def test_lora_keeps_the_adapters_of_the_warmup() -> None:
    assert (LORA.adapters, LORA.cycle) == (WARMUP.adapters, WARMUP.cycle)
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
    again = Plan.from_json(json.loads(json.dumps(to_json(plan))))
    assert again == plan
    assert isinstance(again.trainable, frozenset)


@given(PLANS)
def test_any_plan_round_trips_json_to_the_same_text(plan: Plan) -> None:
    text = json.dumps(to_json(plan))
    again = Plan.from_json(json.loads(text))
    assert again == plan
    assert json.dumps(to_json(again)) == text


def test_json_does_not_hang_on_the_order_of_sets() -> None:
    assert to_json(FULL)["trainable"] == sorted(LAYOUT.parameters)
    assert to_json(replace(LORA, active=LORA.trainable))["active"] == sorted(LORA.trainable)


def test_a_plan_of_0_1_0_is_read_with_its_ranks_scalings_and_seed() -> None:
    old = {"phase": "lora", "adapter": "lora", "adapters": {"block.0.q": {"rank": 4, "alpha": 2.0}},
           "trainable": ["block.0.q.lora_B.weight"], "active": ["block.0.q"], "init_seed": 9, "cycle": 0,
           "since_step": 12}
    plan = Plan.from_json(old)
    assert plan.adapters == {"block.0.q": AdapterSpec("lora", 4, 0.5, 9, {"train_a": False})}
    assert plan.training() == plan.trainable == {"block.0.q.lora_B.weight"}
    assert (plan.phase, plan.since_step) == ("lora", 12)
    both = Plan.from_json(old | {"trainable": ["block.0.q.lora_A.weight", "block.0.q.lora_B.weight"]})
    assert both.adapters["block.0.q"].options == {}


def test_the_structure_is_what_a_rebuild_depends_on() -> None:
    specs = {path: replace(spec, seed=99) for path, spec in LORA.adapters.items()}
    for same in (replace(LORA, cycle=3), replace(LORA, active=frozenset()), replace(LORA, adapters=specs),
                 replace(LORA, since_step=1)):
        assert same != LORA
        assert same.structure() == LORA.structure()
    larger = {path: replace(spec, rank=32) for path, spec in LORA.adapters.items()}
    for other in (replace(LORA, adapters=larger), replace(LORA, trainable=LORA.trainable - {"embed"}), WARMUP,
                  replace(LORA, lr_scale={"base": 0.1}), replace(LORA, phase="other")):
        assert other.structure() != LORA.structure()


def test_a_rate_is_scaled_by_role() -> None:
    plan = replace(WARMUP, lr_scale={"b": 16.0, "adapters": 2.0})
    scales = plan.rate_scales(LAYOUT)
    assert scales.keys() == plan.parameters(LAYOUT).keys()
    assert {scales[name] for name in LAYOUT.parameters} == {1.0}
    assert scales["block.0.q.lora_A.weight"] == 2.0 and scales["block.0.q.lora_B.weight"] == 16.0


def test_adapters_that_are_frozen_and_trained_again_are_thawed_later_once_they_exist() -> None:
    attach = PhaseSpec("attach", Adapters("lora", ("q", "fc"), UniformRank(2)))
    phases = [PhaseSpec("full"), attach, PhaseSpec("rest", train=("rest",)), PhaseSpec("again", train=("adapters",))]
    assert needed_in_fp32(phases, LAYOUT, 2) == ADAPTERS
    assert needed_in_fp32(phases, LAYOUT, 3) == frozenset()
    assert needed_in_fp32(phases[:3], LAYOUT, 1) == REST
    assert needed_in_fp32([phases[0], attach], LAYOUT, 0) == set(LAYOUT.parameters)


def test_weights_that_are_quantised_now_or_later_are_needed_in_fp32() -> None:
    attach = PhaseSpec("attach", Adapters("lora", ("q", "fc"), UniformRank(2)))
    lora = PhaseSpec("lora", train=("adapters", "rest"))
    weights = set(LAYOUT.parameters) - REST
    assert needed_in_fp32([attach, lora], LAYOUT, 1) == set()
    phases = [attach, lora, replace(lora, name="qlora", base_dtype="int8"), replace(lora, name="again")]
    quantised = {name for name in weights if name.endswith(".weight")}
    assert [needed_in_fp32(phases, LAYOUT, i) & quantised for i in range(4)] == [quantised] * 3 + [set()]


@pytest.mark.parametrize("train", ["rest", "x"])
def test_a_phase_that_trains_nothing_is_refused(train: str) -> None:
    layout = Layout({"x": (2, 2), "0.q.weight": (2, 2), "1.q.weight": (2, 2)}, {"q": {0: "0.q", 1: "1.q"}},
                    {"0.": 0, "1.": 1})
    spec = PhaseSpec("none", Adapters("lora", ("q",), UniformRank(1)), train=(train,), freeze_below=1)
    with pytest.raises(ValueError, match="no parameter would train"):
        plan_of(spec, layout, seed=0, ranks={"q": {0: 1, 1: 1}})


def test_a_linear_of_rank_0_has_no_adapter_and_is_frozen_where_the_others_are() -> None:
    ranks = {"q": {0: 0, 1: 4}, "fc": {0: 8, 1: 0}}
    warmup = warmup_plan(LAYOUT, ranks, since_step=30)
    lora = lora_plan(LAYOUT, warmup, since_step=60)
    bare = frozenset({"block.0.q", "block.1.fc"})
    assert warmup.unadapted == lora.unadapted == bare
    assert warmup.adapters.keys() == lora.adapters.keys() == {"block.1.q", "block.0.fc"}
    leaves = {name for name in ADAPTERS if name.partition(".lora")[0] not in bare}
    assert warmup.trainable == set(LAYOUT.parameters) | leaves
    assert lora.trainable == REST | leaves
    assert lora.parameters(LAYOUT).keys() == set(LAYOUT.parameters) | leaves


def test_new_adapters_and_the_linears_without_them_replace_the_former_ones() -> None:
    before = lora_plan(LAYOUT, warmup_plan(LAYOUT, {"q": {0: 0, 1: 4}, "fc": {0: 8, 1: 0}}))
    again = PhaseSpec("again", Adapters("lora", ("q",), UniformRank(2)), ("adapters", "rest"))
    plan = plan_of(again, LAYOUT, seed=0, before=before, ranks={"q": {0: 2, 1: 0}})
    assert (plan.adapters.keys(), plan.unadapted, plan.cycle) == ({"block.0.q"}, {"block.1.q"}, 1)
    assert "block.1.q.weight" not in plan.trainable and "block.0.fc.weight" in plan.trainable


def test_only_plans_with_such_linears_name_them_in_their_json() -> None:
    bare = warmup_plan(LAYOUT, {"q": {0: 0, 1: 4}, "fc": {0: 8, 1: 2}})
    assert "unadapted" not in to_json(WARMUP) and to_json(bare)["unadapted"] == ["block.0.q"]
    assert [Plan.from_json(to_json(plan)) for plan in (WARMUP, bare)] == [WARMUP, bare]


def test_layers_of_several_stacks_have_no_single_block() -> None:
    stacks = replace(LAYOUT, blocks={"encoder.0.": 0, "decoder.0.": 0})
    with pytest.raises(ValueError, match=r"more than one layer 0: encoder\.0\., decoder\.0\."):
        stacks.block(0)
    with pytest.raises(ValueError, match="the model has no layer 1"):
        stacks.block(1)


def test_rslora_scales_each_adapter_by_the_root_of_its_rank() -> None:
    spec = PhaseSpec("lora", Adapters("lora", ("q", "fc"), UniformRank(4), rs_alpha=8.0))
    plan = plan_of(spec, LAYOUT, seed=0, ranks={"q": {0: 4, 1: 1}, "fc": {0: 16}})
    assert {path: (adapter.rank, adapter.scaling) for path, adapter in plan.adapters.items()} == {
        "block.0.q": (4, 4.0), "block.1.q": (1, 8.0), "block.0.fc": (16, 2.0)}
