"""Every kind of adapter on real engines: attached, trained, merged, predicted, carried and resumed."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.engines import check_bytes, check_export
from support.kinds import frozen, of_kind
from support.launches import Job, differences, traces
from support.runs import MEDIUM, ZEROS, Trainer, config, micro_batches, same

from prelora_ds.core.adapters import KINDS
from prelora_ds.engine.measure import weight_norms
from prelora_ds.engine.merge import fold_adapters
from prelora_ds.engine.state import copy_state, gather_full
from prelora_ds.engine.transition import transition
from prelora_ds.exporting.hf import merge
from prelora_ds.run.decide import change_adapters

OWN = [kind for kind in KINDS if kind != "lora"]  # most other tests of ranks have adapters of the kind lora
WITHOUT_OFFLOAD = [zero for zero in ZEROS if not zero.endswith("offload")]


def settings(*quick, zeros=tuple(ZEROS), kinds=OWN):
    """Return every one of ``kinds`` at every stage; all but those of ``quick`` are long tests."""
    return [(kind, zero) if (kind, zero) in quick else pytest.param(kind, zero, marks=pytest.mark.long)
            for kind in kinds for zero in zeros]


@pytest.mark.parametrize(("kind", "zero"), settings(
    ("dora", "zero0"), ("dora", "zero2"), ("dora", "zero3"), ("vera", "zero3"), ("lokr", "zero2"), ("oft", "zero3"),
    ("miss", "zero0"), ("ia3", "zero3"), ("adalora", "zero2")))
def test_a_kind_is_attached_trained_frozen_and_merged(ranks, kind, zero):
    ranks.run(walk, kind=kind, zero=zero)


def walk(kind, zero):
    t = Trainer(config(zero))
    t.train(1)
    warmup = of_kind(t.warmup, t.layout, kind)
    before = t.outputs()
    t.switch(warmup)
    assert torch.equal(before, t.outputs())  # a new adapter changes nothing
    t.train(2)
    lora = frozen(warmup, t.layout)
    outputs, norms = t.outputs(), weight_norms(t.engine)
    t.switch(lora)
    assert torch.equal(outputs, t.outputs()) and weight_norms(t.engine) == norms

    first = t.whole_state()
    losses = []
    for _ in range(6):  # over the same batch
        losses.append(t.engine.train_step(micro_batches(t.cfg, 0, t.rank, t.world), lr=5e-3).loss)
    assert losses[-1] < losses[0]
    state = t.whole_state()
    moved = {name for name, what in state if what == "master"
             and not torch.equal(first[name, "master"], state[name, "master"])}
    assert moved == lora.trainable
    assert all(torch.isfinite(value).all() for value in state.values() if torch.is_tensor(value))

    # another engine of the same plan continues with the same bits
    outputs = t.outputs()
    t.switch(replace(lora, since_step=9))
    assert torch.equal(outputs, t.outputs()) and same(state, t.whole_state()) == []
    check_export(t)
    if KINDS[kind].can.merges:
        check_fold(t, kind)
    t.close()


def check_fold(t, kind):
    """Merge the adapters into the weights in a transition, and compare the weights with those of an export."""
    state, plan = copy_state(t.engine.ds), t.engine.plan
    for part in state.slices.values():
        part.value = part.value.float()  # fp32 values of frozen weights, as `Engine.parked` has them
    values = {name: gather_full(state, name, "value", shape, torch.device("cpu"))
              for name, shape in plan.parameters(t.layout).items()}
    expected = merge(values, plan, t.layout)
    bare = replace(t.full, phase="full")
    fold_adapters(state, plan, bare, layout=t.layout)
    assert not any(name not in t.layout.parameters for name in state.slices)
    for path in plan.adapters:
        name = f"{path}.weight"
        folded = gather_full(state, name, "value", t.layout.parameters[name], torch.device("cpu"))
        torch.testing.assert_close(folded, expected[name], rtol=2e-6, atol=1e-7)
        assert not torch.equal(folded, values[name])


@pytest.mark.parametrize(("kind", "zero"), settings(("vera", "zero2")))
def test_bytes_of_a_kind_are_as_predicted(ranks, kind, zero):
    ranks.run(bytes_as_predicted, kind=kind, zero=zero)


def bytes_as_predicted(kind, zero):
    t = Trainer(config(zero, model=MEDIUM))
    warmup = of_kind(t.warmup, t.layout, kind)
    check_bytes(t, warmup)
    check_bytes(t, frozen(warmup, t.layout))
    t.close()


@pytest.mark.parametrize(("kind", "zero"), settings(
    ("dora", "zero2"), ("lokr", "zero3"), ("ia3", "zero1"), zeros=WITHOUT_OFFLOAD,
    kinds=[kind for kind in OWN if KINDS[kind].can.selects]))
def test_inactive_adapters_stay_bitwise(ranks, kind, zero):
    ranks.run(selected, kind=kind, zero=zero)


def selected(kind, zero):
    t = Trainer(config(zero, chooses=True))
    lora = frozen(of_kind(t.warmup, t.layout, kind), t.layout)
    t.switch(lora)
    t.train(2)
    leaves = lora.leaves(t.layout)
    idle = {name for name, (path, _) in leaves.items() if path in sorted(lora.adapters)[::2]}
    before = t.whole_state()
    t.engine.set_active(lora.trainable - idle)
    t.train(3)
    after = t.whole_state()
    still = {key: value for key, value in before.items() if key[0] in idle}
    assert same(still, {key: after[key] for key in still}) == []
    assert all(not torch.equal(after[name, "master"], before[name, "master"]) for name in lora.trainable - idle)
    t.engine.measure("forward")
    t.engine.backward(t.batches())
    importance = t.engine.finish_step(lr=1e-3).importance
    assert importance.keys() == lora.adapters.keys() and all(value > 0 for value in importance.values())
    t.close()


def test_dora_is_replaced_by_lora_with_the_same_outputs_up_to_rounding(ranks):
    ranks.run(from_dora_to_lora)


def from_dora_to_lora():
    t = Trainer(config("zero2"))
    dora = frozen(of_kind(t.warmup, t.layout, "dora"), t.layout)
    t.engine, _ = transition(t.engine, dora, parked=frozenset(f"{path}.weight" for path in dora.adapters))
    t.train(4)
    before, norms = t.outputs(), weight_norms(t.engine)
    lora = replace(frozen(t.warmup, t.layout), cycle=1)
    t.engine, _ = transition(t.engine, lora, edit=partial(fold_adapters, layout=t.layout))
    assert (t.outputs() - before).norm() < 0.02 * before.norm()
    for family, layers in weight_norms(t.engine).effective.items():
        assert layers == pytest.approx(norms.effective[family], rel=2e-3)
    t.train(2)
    t.close()


@pytest.mark.parametrize("zero", ["zero2", *(
    pytest.param(zero, marks=pytest.mark.long) for zero in ("zero0", "zero3"))])
def test_a_may_begin_at_the_directions_of_the_last_update(ranks, zero):
    ranks.run(from_the_update, zero=zero)


def from_the_update(zero):
    t = Trainer(config(zero))
    t.train(3)
    moments, before = t.whole_state(), t.outputs()
    adapters = {path: replace(spec, options={"init": "update"}) for path, spec in t.warmup.adapters.items()}
    warmup = replace(t.warmup, adapters=adapters)
    t.engine, _ = transition(t.engine, warmup, edit=partial(change_adapters, layout=t.layout))
    assert torch.equal(before, t.outputs())
    state = t.whole_state()
    for path, spec in warmup.adapters.items():
        shape = t.layout.parameters[f"{path}.weight"]
        first, second = (moments[f"{path}.weight", key].view(shape).double() for key in ("exp_avg", "exp_avg_sq"))
        update = first / second.sqrt().clamp_min(1e-30)
        a = state[f"{path}.lora_A.weight", "master"].view(spec.rank, -1).double()
        torch.testing.assert_close(a @ a.t(), torch.eye(spec.rank, dtype=a.dtype) / 3, rtol=0, atol=1e-5)
        gains = (update @ a.t()).norm(dim=0) * 3**0.5
        expected = torch.linalg.svdvals(update)[: spec.rank]
        torch.testing.assert_close(gains, expected, rtol=1e-4, atol=1e-6)
    assert not any(what == "step" and ".lora_A" in name for name, what in state)
    t.train(2)
    t.close()


# ---- from the recipe to the exported model

NONE = ("convergence=null", "lora.r_min=8", "lora.r_max=64", "lora.warmup=10 epochs")
SETTINGS = (*NONE, "observe.every=2 steps", "train.duration=8 steps", "checkpoint.every=1 steps",
            "checkpoint.keep_last=30", "train.eval_every=4 steps")


def method(kind):
    rank = ", rank: 4" if KINDS[kind].can.ranked else ""
    pruned = ", options: {begin: 1 steps, end: 4 steps, every: 1 steps}" if kind == "adalora" else ""
    active = "active: {choose: discounted, k: 6, every: 2 steps}" if KINDS[kind].can.selects else ""
    return (f"phases=[{{name: full, until: 2 steps}}, {{name: joint, adapters: {{kind: {kind}{rank}{pruned}}}, "
            f"until: 2 steps}}, {{name: lora, train: [adapters, rest], {active}}}]")


def start(forge, shards, out, kind, zero, **options):
    micro = ["train.micro_batch_size=32"] if zero == 0 else []  # stage 0 does not accumulate
    return Job(forge, out, shards, *SETTINGS, method(kind), *micro, zero=zero, **options)


@pytest.mark.long
@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_run_that_was_killed_equals_the_one_that_was_not(forge, shards, tmp_path, kind, zero):
    whole = start(forge, shards, tmp_path / "whole", kind, zero)
    assert whole.end() == [0, 0], whole.said()[-3000:]
    out = tmp_path / "out"
    killed = start(forge, shards, out, kind, zero, faults={1: {"place": "step", "call": 6, "delay": 0}})
    assert killed.end()[1] == -signal.SIGKILL, killed.said()[-3000:]
    again = start(forge, shards, out, kind, zero)
    assert again.end() == [0, 0], again.said()[-3000:]
    assert "resuming after step" in again.said()
    assert differences(traces(tmp_path / "whole"), traces(out)) == []
