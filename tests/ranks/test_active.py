"""Inactive parameters on a live engine at every ZeRO stage: they do not change, the others train."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

import pytest
import torch
from support.runs import SMALL, ZEROS, Trainer, config, same

from prelora_ds.core.adapters import Lora
from prelora_ds.engine.fragments import adam_state, fragments
from prelora_ds.engine.measure import check_ranks_agree
from prelora_ds.engine.optimizer import inner_optimizer
from prelora_ds.model.adapters.lora import lora_linears
from prelora_ds.model.families import canonical_name, named_parameters

ALL = pytest.mark.parametrize("zero", ZEROS)
CLIP = 0.05  # far below every gradient norm here
MODEL = {**SMALL, "num_hidden_layers": 2}
OFFLOADS = ("zero2_offload", "zero3_offload")
KERNELS = [*((zero, "branch") for zero in ZEROS), ("zero1", "merged"), ("zero2", "merged")]
B = Lora.B
TORCH_ADAM = {"zero_force_ds_cpu_optimizer": False}


def trainer(zero, **sections):
    """Return a trainer of two layers that starts in the LoRA phase, with a clip that takes effect.

    A step has two micro-batches if the stage accumulates.
    """
    sections = {"optimizer": {"clip_grad_norm": CLIP}, "micro": 4 if zero == "zero0" else 2,
                "model": MODEL, **sections}
    return Trainer(config(zero, chooses=True, **sections), begin="lora")


def without(plan, modules, *others):
    """Return what trains, without the adapters of ``modules`` and without ``others``."""
    return plan.trainable - {name for name in plan.trainable if name.partition(".lora_")[0] in modules} - set(others)


def selections(plan):
    """Return two selections: without every second adapter, and without every third and others."""
    modules = sorted(plan.adapters)
    rest = [name for name in plan.trainable if "layers.0.layernorm" in name or name.endswith("cls_token")]
    assert len(rest) == 5
    return without(plan, modules[::2]), without(plan, modules[1::3], *rest)


def everything(t):
    """Return `snapshot` and this rank's BF16 weights."""
    weights = {(name, "weight"): getattr(p, "ds_tensor", p).detach().float().clone()
               for name, p in named_parameters(t.engine.module).items()}
    return t.snapshot() | weights


def steps_of(t):
    return dict(inner_optimizer(t.engine.ds).steps)


# ---- all of them active

@ALL
def test_with_all_active_a_step_is_that_of_the_stock_optimizer_bitwise(ranks, zero):
    ranks.run(against_stock, zero=zero)


def against_stock(zero):
    runs = []
    for stock in (False, True):
        t = trainer(zero)
        inner = inner_optimizer(t.engine.ds)
        if stock:
            inner.__class__ = type(inner).__bases__[1]  # torch's or DeepSpeed's own class; the state has the same form
            assert inner.__class__.__module__.startswith(("torch.optim", "deepspeed.ops"))
        losses, state = t.train(3), everything(t)
        steps = [int(s["step"]) for s in inner.state.values()] if stock else list(steps_of(t).values())
        assert set(steps) == {3}
        runs.append((losses, {key: value for key, value in state.items() if key[1] != "step"}))
        t.close()
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1]) == []


# ---- some of them not

@pytest.mark.parametrize(("zero", "mode"), KERNELS)
def test_inactive_parameters_stay_bitwise_and_each_name_has_its_own_step(ranks, zero, mode):
    ranks.run(two_selections, zero=zero, mode=mode)


def two_selections(zero, mode):
    t = trainer(zero, lora={"mode": mode})
    t.train(2)
    expected = dict.fromkeys(t.lora.trainable, 2)
    for names in selections(t.lora):
        t.engine.set_active(names)
        before = everything(t)
        for attempt in range(3):
            t.engine.backward(t.batches())
            stats = t.engine.finish_step(lr=1e-3, accept=lambda loss, attempt=attempt: attempt != 1)
            assert stats.skipped == (attempt == 1)
            assert stats.grad_norm > 2 * CLIP or stats.skipped
            t.step += 1
        expected = {name: step + 2 * (name in names) for name, step in expected.items()}
        assert steps_of(t) == expected  # on every rank, no matter which one holds the parameter
        after = everything(t)
        moved = {name for name, what in same(before, after) if what != "step"}
        merged = {f"{path}.weight" for path in t.lora.adapters if mode == "merged" and f"{path}.{B}" in names}
        assert moved <= names | merged, sorted(moved - names - merged)[:3]
        assert {name for name in names if (name, "master") in after} == {
            name for name, what in same(before, after) if what == "master"}
        check_ranks_agree(t.engine)

    by_flat = {}
    for f in fragments(t.engine.ds):
        by_flat.setdefault(id(f.flat), set()).add(expected[f.name])
    assert set(expected.values()) == {2, 4, 6}
    # They share one flat tensor, except at stage 0, where each parameter has its own.
    assert max(map(len, by_flat.values())) == (1 if zero == "zero0" else 3)
    del f
    if mode == "branch":
        a_rebuild_carries_it(t, expected)
    else:
        t.close()


def a_rebuild_carries_it(t, expected):
    active = t.engine.plan.training()
    whole, outputs = t.whole_state(), t.outputs()
    t.switch(t.engine.plan)
    assert same(whole, t.whole_state()) == [] and torch.equal(outputs, t.outputs())
    assert steps_of(t) == expected
    before = everything(t)
    t.train(1)
    assert {name for name, what in same(before, everything(t)) if what != "step"} <= active
    assert steps_of(t) == {name: step + (name in active) for name, step in expected.items()}
    t.engine.set_active(t.lora.trainable)
    assert inner_optimizer(t.engine.ds).active is None
    assert all(isfinite(loss) for loss in t.train(1)) and t.engine.ds.skipped_steps == 2
    t.close()


@pytest.mark.parametrize(("zero", "deepspeed"), [
    *((zero, {}) for zero in ZEROS), *(pytest.param(zero, TORCH_ADAM, marks=pytest.mark.long) for zero in OFFLOADS)])
def test_the_active_ones_train_as_if_the_others_were_frozen(ranks, zero, deepspeed):
    ranks.run(against_frozen, zero=zero, deepspeed=deepspeed)


def against_frozen(zero, deepspeed):
    """Compare with an engine whose optimizer does not have the others.

    DeepSpeedCPUAdam accumulates the powers of its betas and restarts them in a rebuild, so with it
    the others never had a gradient.
    """
    warm = 0 if "offload" in zero and not deepspeed else 2
    runs = []
    for frozen in (False, True):
        t = trainer(zero, deepspeed=deepspeed)
        names = selections(t.lora)[1]
        t.train(warm)
        if frozen:
            t.switch(replace(t.lora, trainable=names))
        else:
            t.engine.set_active(names)
        stats = []
        for _ in range(4):
            stats.append(t.engine.train_step(t.batches(), lr=1e-3))
            t.step += 1
        whole = {key: value for key, value in t.whole_state().items() if key[0] in names}
        weights = {name: getattr(p, "ds_tensor", p).detach().view(-1).clone()
                   for name, p in named_parameters(t.engine.module).items()}
        runs.append((stats, whole, weights))
        t.close()
    (live, live_state, live_weights), (frozen, frozen_state, frozen_weights) = runs
    assert [s.loss for s in live] == [s.loss for s in frozen]
    assert [s.grad_norm for s in live] == pytest.approx([s.grad_norm for s in frozen], rel=1e-6)
    assert live_weights.keys() == frozen_weights.keys()
    for name, weight in live_weights.items():
        assert torch.equal(weight, frozen_weights[name]), name
    assert {what: 0 for _, what in live_state} == {what: 0 for _, what in frozen_state}
    assert all(live_state[key] == value for key, value in frozen_state.items() if key[1] == "step")


@pytest.mark.parametrize(("zero", "mode"), KERNELS)
def test_an_inactive_adapter_stores_no_input_and_computes_no_gradient(ranks, zero, mode):
    ranks.run(what_backward_needs, zero=zero, mode=mode)


def what_backward_needs(zero, mode):
    t = trainer(zero, lora={"mode": mode})
    t.train(1)
    names, seen = selections(t.lora)[0], {}
    paths = {module: path for path, module in t.engine.module.named_modules()}

    def see(module, _, output):
        node = output.grad_fn
        while "_LoraProduct" not in type(node).__name__:  # DeepSpeed's hooks of stage 3 wrap the output
            node = node.next_functions[0][0]
        x, h, *_ = node.saved_tensors
        kept = x is not None or h is not None
        seen.setdefault(canonical_name(paths[module]), set()).add((kept, *node.needs_input_grad[3:5]))

    hooks = [linear.register_forward_hook(see) for linear in lora_linears(t.engine.module)]
    for active in (names, t.lora.trainable):
        t.engine.set_active(active)
        seen.clear()
        t.train(1)
        assert seen == {path: {(f"{path}.{B}" in active,) * 3} for path in t.lora.adapters}
    for hook in hooks:
        hook.remove()
    t.close()


@ALL
def test_a_gradient_that_is_not_finite_vanishes_with_its_adapter(ranks, zero):
    ranks.run(nan_in_one_adapter, zero=zero)


def nan_in_one_adapter(zero):
    t = trainer(zero)
    t.train(1)
    module = sorted(t.lora.adapters)[0]
    p = named_parameters(t.engine.module)[f"{module}.lora_B.weight"]
    hook = p.register_hook(lambda grad: torch.full_like(grad, float("nan")))
    steps = steps_of(t)
    stats = t.engine.train_step(t.batches(), lr=1e-3)
    assert stats.skipped and steps_of(t) == steps
    hook.remove()
    for names in (without(t.lora, {module}), t.lora.trainable):
        t.engine.set_active(names)
        for _ in range(2):
            stats = t.engine.train_step(t.batches(), lr=1e-3)
            t.step += 1
            assert not stats.skipped and isfinite(stats.grad_norm)
    assert all(torch.isfinite(p).all() for p in t.engine.module.parameters())
    del p
    t.close()


@ALL
def test_a_gradient_of_one_rank_that_is_not_finite_skips_the_update_of_all(ranks, zero):
    ranks.run(nan_on_one_rank, zero=zero)


def nan_on_one_rank(zero):
    t = Trainer(config(zero, model=MODEL), begin="lora")
    t.train(1)
    before = everything(t)
    hook = None
    if t.rank == 1:
        p = named_parameters(t.engine.module)["classifier.bias"]
        hook = p.register_hook(lambda grad: grad * float("nan"))
        del p
    assert t.engine.train_step(t.batches(), lr=1e-3).skipped
    assert same(before, everything(t)) == []
    if hook is not None:
        hook.remove()
    stats = t.engine.train_step(t.batches(), lr=1e-3)
    assert not stats.skipped and isfinite(stats.grad_norm)
    t.close()


# ---- in other settings

@pytest.mark.parametrize("zero", [
    "zero1", "zero2", "zero3", *(pytest.param(zero, marks=pytest.mark.long) for zero in OFFLOADS)])
def test_one_active_adapter_trains_with_small_buckets_and_overlapping_collectives(ranks, zero):
    ranks.run(one_adapter, zero=zero)


def one_adapter(zero):
    settings = {"overlap_comm": True, "contiguous_gradients": False, "reduce_bucket_size": 3000,
                "allgather_bucket_size": 3000}
    if "zero3" in zero:
        settings |= {"sub_group_size": 3000, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    t = trainer(zero, deepspeed={"zero_optimization": {**ZEROS[zero], **settings}})
    modules = sorted(t.lora.adapters)
    first, second = without(t.lora, modules[::2]), without(t.lora, modules[1::2])
    only = frozenset(name for name in t.lora.leaves(t.layout) if name.startswith(modules[5]))
    assert len(only) == 2
    t.train(1)
    for names in (first, second, only, t.lora.trainable):
        t.engine.set_active(names)
        before = t.whole_state()
        assert all(isfinite(loss) for loss in t.train(2))
        moved = {name for name, what in same(before, t.whole_state()) if what == "master"}
        assert moved == names, (sorted(moved - names)[:3], sorted(names - moved)[:3])
    t.close()


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_a_selection_trains_the_same_with_checkpointed_activations(ranks, zero):
    ranks.run(selection_with_checkpointed_activations, zero=zero)


def selection_with_checkpointed_activations(zero):
    runs = []
    for checkpointed in (False, True):
        t = trainer(zero, model={**MODEL, "activation_checkpointing": checkpointed})
        losses = t.train(1)
        for names in selections(t.lora):
            t.engine.set_active(names)
            losses += t.train(2)
        runs.append((losses, t.whole_state()))
        t.close()
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1]) == []


@pytest.mark.parametrize("zero", ["zero1", "zero2"])
def test_merged_linears_of_inactive_adapters_are_not_touched_until_a_rebuild(ranks, zero):
    ranks.run(merged_selection, zero=zero)


def merged_selection(zero):
    t = trainer(zero, lora={"mode": "merged"})
    t.train(2)
    names = selections(t.lora)[0]
    t.engine.set_active(names)
    idle = [linear for linear in lora_linears(t.engine.module) if not linear.active]
    assert 0 < len(idle) < len(t.lora.adapters)
    before = {id(linear): linear.get_base_layer().weight.detach().clone() for linear in idle}
    for linear in idle:  # a merge would now write other values
        linear.fp32_weight.add_(1)
    t.train(2)
    assert all(torch.equal(linear.get_base_layer().weight, before[id(linear)]) for linear in idle)
    for linear in idle:
        linear.fp32_weight.sub_(1)
    outputs = t.outputs()
    del idle, linear
    t.switch(t.engine.plan)
    assert torch.allclose(outputs, t.outputs(), atol=2e-2)  # adding to the bases rounded them
    t.close()


# ---- refused

def test_an_invalid_selection_is_refused_on_every_rank_and_changes_nothing(ranks):
    said = ranks.run(refused_selections)
    assert said[0] == said[1]
    foreign, frozen, empty, other = said[0]
    assert foreign == "rank 1 activates 'nobody', which is not a parameter that trains in phase lora"
    assert "attention.q_proj.weight', which is not a parameter that trains" in frozen
    assert empty == "rank 1 activates no parameter: nothing would train"
    assert other == "ranks [1] activate other parameters than rank 0"


def refused_selections():
    t = trainer("zero2")
    t.train(1)
    names, said = selections(t.lora)[0], []
    frozen = "vit.layers.0.attention.q_proj.weight"
    for wrong in ({*names, "nobody"}, {*names, frozen}, (), selections(t.lora)[1]):
        with pytest.raises(ValueError) as refused:
            t.engine.set_active(wrong if t.rank == 1 else names)
        said.append(str(refused.value))
    assert t.engine.plan == t.lora and inner_optimizer(t.engine.ds).active is None
    t.train(1)
    assert set(steps_of(t).values()) == {2}
    t.close()
    return said


@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"mode": "peft"}])
def test_peft_s_forward_pass_does_not_change_inactive_adapters(ranks, lora):
    ranks.run(selection_by_peft, lora=lora)


def selection_by_peft(lora):
    t = Trainer(config("zero2", model=MODEL, micro=2, lora=lora), begin="lora")
    t.train(1)
    names = selections(t.lora)[0]
    t.engine.set_active(names)
    before = everything(t)
    t.train(2)
    moved = {name for name, what in same(before, everything(t)) if what != "step"}
    assert moved and moved <= names
    t.close()


# ---- DeepSpeed's own checkpoints

@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_deepspeed_s_own_checkpoint_has_the_step_that_stock_optimizers_read(ranks, zero):
    ranks.run(step_in_the_state_dict, zero=zero)


def step_in_the_state_dict(zero):
    t = trainer(zero)
    t.train(2)
    assert all("step" not in held for held in adam_state(t.engine.ds).values())
    t.engine.ds.optimizer.state_dict()
    cpu = zero == "zero2_offload"
    for held in adam_state(t.engine.ds).values():
        assert held["step"] == 2 and isinstance(held["step"], int if cpu else torch.Tensor)
    t.train(1)
    t.close()
