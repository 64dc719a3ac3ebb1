"""Phases beyond PreLoRA's three on real engines: thawing, edits of the state, other adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.plans import prelora
from support.runs import MEDIUM, ZEROS, Trainer, config, micro_batches, same
from support.toy_kind import register

from prelora_ds.core.adapters import AdapterSpec
from prelora_ds.core.controller import PhaseController, PhaseState
from prelora_ds.core.duration import Duration
from prelora_ds.core.phases import PhaseSpec, needed_in_fp32, plan_of
from prelora_ds.core.schedule import Timeline
from prelora_ds.cost.bytes import predict_bytes
from prelora_ds.engine.census import census, wait_until
from prelora_ds.engine.measure import gathered, weight_norms
from prelora_ds.engine.transition import transition
from prelora_ds.model.adapters import check_names
from prelora_ds.model.families import named_parameters
from prelora_ds.run.decide import engine_for

LONG = ("zero1", "zero2_offload", "zero3_offload")  # run by `make test-long`


# ---- a phase that trains again what an earlier one froze

@pytest.mark.parametrize("zero", [
    pytest.param(zero, marks=pytest.mark.long) if zero in LONG else zero for zero in ZEROS])
def test_thawed_parameters_continue_from_their_fp32_values_bitwise(ranks, zero):
    ranks.run(thaw, zero=zero)


def thaw(zero):
    t = Trainer(config(zero))
    t.train(2)
    t.switch(t.warmup)
    t.train(2)
    masters = {key: value for key, value in t.whole_state().items() if key[1] == "master"}
    frozen = t.warmup.trainable - t.lora.trainable
    assert any(not torch.equal(masters[name, "master"].bfloat16().float(), masters[name, "master"]) for name in frozen)

    t.engine, _ = transition(t.engine, t.lora, parked=frozen)
    assert t.engine.parked.keys() <= frozen
    t.train(2)
    again = replace(t.lora, phase="warmup", trainable=t.warmup.trainable, since_step=9)
    t.engine, _ = transition(t.engine, again)
    assert t.engine.parked == {}
    state = t.whole_state()
    thawed = {(name, "master"): state[name, "master"] for name in frozen}
    assert same(thawed, {key: masters[key] for key in thawed}) == []
    steps = {name: state.get((name, "step"), 0) for name in t.warmup.trainable}
    assert {steps[name] for name in frozen} == {0}  # fresh moments, as after a reset
    t.train(2)
    t.close()


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_thawed_adapters_continue_from_their_fp32_values_bitwise(ranks, zero):
    ranks.run(thaw_adapters, zero=zero)


def thaw_adapters(zero):
    t = Trainer(config(zero))
    t.switch(t.warmup)
    t.train(2)
    masters = t.whole_state()
    adapters = t.warmup.leaves(t.layout).keys()

    phases = [*prelora(t.layout)[:2], PhaseSpec("lora", train=("rest",)), PhaseSpec("warmup", train=("adapters",))]
    parked = needed_in_fp32(phases, t.layout, 2)
    frozen = replace(t.lora, trainable=t.lora.trainable - adapters)
    t.engine, _ = transition(t.engine, frozen, parked=parked)
    predicted = predict_bytes(frozen, t.layout, t.cfg.zero, t.world, after_backward=False, parked=parked)
    measured = wait_until(lambda: census(t.engine), lambda found: found["other"] == 0)
    assert predicted.host > 0
    assert abs(measured["host"] - predicted.host) <= 0.02 * predicted.host, (predicted, measured)
    t.train(1)

    t.engine, _ = transition(t.engine, replace(t.warmup, trainable=frozenset(adapters)))
    thawed = {(name, "master"): masters[name, "master"] for name in adapters}
    assert any(not torch.equal(value.bfloat16().float(), value) for value in thawed.values())
    assert same(thawed, t.whole_state()) == []
    t.close()


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_parked_values_have_the_predicted_size_and_one_owner(ranks, zero):
    ranks.run(parked_bytes, zero=zero)


def parked_bytes(zero):
    t = Trainer(config(zero, model=MEDIUM))
    t.switch(t.warmup)
    frozen = t.warmup.trainable - t.lora.trainable
    t.engine, _ = transition(t.engine, t.lora, parked=frozen)
    predicted = predict_bytes(t.lora, t.layout, t.cfg.zero, t.world, after_backward=False, parked=frozen)
    measured = wait_until(lambda: census(t.engine), lambda found: found["other"] == 0)
    assert predicted.host > 0
    assert abs(measured["host"] - predicted.host) <= 0.02 * predicted.host, (predicted, measured)
    t.engine, _ = transition(t.engine, replace(t.lora, since_step=9))
    assert census(t.engine)["host"] == 0
    t.close()


def test_only_what_a_later_phase_trains_is_parked(ranks):
    ranks.run(nothing_is_parked)


def nothing_is_parked():
    t = Trainer(config("zero2"))
    phases = [*prelora(t.layout), PhaseSpec("again", train=("norms",)), PhaseSpec("all")]
    assert [len(needed_in_fp32(phases[:3], t.layout, i) - t.lora.trainable) for i in range(3)] == [len(
        t.layout.parameters.keys() - t.lora.trainable), 0, 0]
    assert needed_in_fp32(phases, t.layout, 2) == t.lora.parameters(t.layout).keys()
    t.close()


# ---- sets of parameters without adapters

SETS = ("biases", "norms", "head", "embeddings")


@pytest.mark.parametrize("zero", ["zero2", "zero3", *(
    pytest.param(zero, marks=pytest.mark.long) for zero in ("zero0", "zero1"))])
def test_sets_of_parameters_train_together_without_adapters(ranks, zero):
    ranks.run(trains_sets, zero=zero, sets=[SETS])


@pytest.mark.long
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_each_set_of_parameters_trains_without_adapters(ranks, zero):
    ranks.run(trains_sets, zero=zero, sets=[(name,) for name in SETS])


def trains_sets(zero, sets):
    t = Trainer(config(zero))
    t.train(1)
    for names in sets:
        plan = plan_of(PhaseSpec("lora", train=names), t.layout, seed=0, since_step=t.step)
        before = t.outputs()
        t.switch(plan)
        assert torch.equal(before, t.outputs()), names
        first = t.whole_state()
        losses = [t.engine.train_step(micro_batches(t.cfg, 0, t.rank, t.world), lr=5e-3).loss for _ in range(5)]
        assert losses[-1] < losses[0], (names, losses)
        state = t.whole_state()
        assert {name for name, what in state if what == "master"} == plan.trainable
        assert all(not torch.equal(first[name, "master"], state[name, "master"]) for name in plan.trainable), names

        found = wait_until(lambda: census(t.engine), lambda measured: measured["other"] == 0)
        predicted = predict_bytes(plan, t.layout, t.cfg.zero, t.world, after_backward=False)
        padding = 4 * t.world * len(plan.trainable)  # bytes of one moment, at most
        assert abs(found["masters"] - predicted.masters) <= 0.02 * predicted.masters + padding, (names, found)
        assert abs(found["moments"] - predicted.moments) <= 0.02 * predicted.moments + 2 * padding, (names, found)
    t.close()


# ---- an edit of the state during a transition

@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_an_edit_changes_the_state_between_two_engines(ranks, zero):
    ranks.run(edited, zero=zero)


def edited(zero):
    t, seen = Trainer(config(zero)), []
    t.train(1)
    before = t.whole_state()

    def double_the_head(state, old, new):
        seen.append((old, new))
        if "classifier.weight" in state.slices:
            state.slices["classifier.weight"].value.mul_(2)

    t.engine, _ = transition(t.engine, t.warmup, edit=double_the_head)
    after, key = t.whole_state(), ("classifier.weight", "master")
    assert seen == [(t.full, t.warmup)]
    assert torch.equal(after[key], 2 * before[key])
    assert same({k: v for k, v in before.items() if k != key}, {k: after[k] for k in before if k != key}) == []
    t.close()


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_a_phase_may_begin_with_new_moments(ranks, zero):
    ranks.run(with_new_moments, zero=zero)


def with_new_moments(zero):
    """Masters stay bitwise; moments and steps are those of parameters that never trained, and training goes on."""
    t = Trainer(config(zero))
    t.train(2)
    before = t.whole_state()
    assert any(bool(value.any()) for (_, what), value in before.items() if what.startswith("exp"))
    phases = [PhaseSpec("full", until=Duration("2 steps")), PhaseSpec("warmup", resets_moments=True)]
    controller = PhaseController(layout=t.layout, timeline=Timeline(8, 8, Duration("9 steps")), phases=phases, seed=0)
    plan = plan_of(phases[1], t.layout, seed=0, since_step=2, before=t.full)
    t.engine, change = engine_for(t.engine, PhaseState(plan, index=1), controller, None)
    assert change.switch is not None
    after = t.whole_state()
    assert {key for key in before if key[1] == "master"} <= after.keys() <= before.keys()
    for (name, what), value in after.items():
        if what == "master":
            assert torch.equal(value, before[name, what]), name
        elif what == "step":
            assert value == 0, name
        else:
            assert not value.any(), (name, what)
    t.train(1)
    assert {value for (_, what), value in t.whole_state().items() if what == "step"} == {1}
    t.close()


# ---- another kind of adapter

@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_a_second_kind_of_adapter_is_attached_trained_measured_and_carried(ranks, zero):
    ranks.run(toy_run, zero=zero)


def toy_run(zero):
    register()
    t = Trainer(config(zero))
    t.train(1)
    warmup = replace(t.warmup, adapters={path: AdapterSpec("toy", None, 1.0, 0) for path in t.warmup.adapters})
    spec = PhaseSpec("warmup")
    warmup = plan_of(spec, t.layout, seed=0, before=warmup)
    before = t.outputs()
    t.switch(warmup)
    assert torch.equal(before, t.outputs())
    t.train(3)
    lora = plan_of(PhaseSpec("lora", train=("adapters", "rest")), t.layout, seed=0, before=warmup)
    outputs, norms = t.outputs(), weight_norms(t.engine)
    t.switch(lora)
    assert torch.equal(outputs, t.outputs()) and weight_norms(t.engine) == norms
    assert len(lora.trainable & lora.leaves(t.layout).keys()) == len(lora.adapters)

    path = t.layout.targets["fc1"][0]
    parameters = named_parameters(t.engine.module)
    with gathered(t.engine, [parameters[f"{path}.weight"], parameters[f"{path}.gain"]]) as (weight, gain):
        assert gain.abs().max() > 0
        expected = (weight.float() * (1 + gain.float())[:, None]).norm().item()
    del weight, gain, parameters
    assert norms.effective["fc1"][0] == pytest.approx(expected, rel=1e-6)
    predicted = predict_bytes(lora, t.layout, t.cfg.zero, t.world, after_backward=False)
    assert abs(census(t.engine)["masters"] - predicted.masters) <= 0.02 * predicted.masters
    t.train(2)
    t.close()


def test_a_module_whose_names_do_not_match_the_plan_is_refused(ranks):
    ranks.run(other_names)


def other_names():
    t = Trainer(config("zero2"))
    check_names(t.engine.module, t.full, t.layout)
    for change in ({"extra": (3,)}, {"classifier.bias": (11,)}):
        layout = replace(t.layout, parameters={**t.layout.parameters, **change})
        with pytest.raises(RuntimeError, match=f"parameter {next(iter(change))} has the shape .* in the plan of phase"):
            check_names(t.engine.module, t.full, layout)
    with pytest.raises(RuntimeError, match="buffer scale has the shape None in the model"):
        check_names(t.engine.module, t.full, replace(t.layout, buffers={"scale": (1,)}))
    t.close()
