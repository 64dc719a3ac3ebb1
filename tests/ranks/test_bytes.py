"""The predicted bytes of every owner, and those that exist, in every phase of every method."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
from support.runs import MEDIUM, ZEROS, Trainer, config, only_owned

import prelora_ds.cost.bytes
from prelora_ds.core.phases import needed_in_fp32, plans_at_rank
from prelora_ds.core.selection import first_choice, with_active
from prelora_ds.cost.bytes import bucket_elements, predict_bytes
from prelora_ds.engine.census import OWNERS, census, wait_until
from prelora_ds.engine.merge import fold_adapters, merge_adapters
from prelora_ds.engine.transition import transition
from prelora_ds.model.families import named_parameters

ALL = pytest.mark.parametrize("zero", ZEROS)


@ALL
def test_bytes_of_every_owner_are_as_predicted(ranks, zero):
    ranks.run(bytes_as_predicted, zero=zero)


def bytes_as_predicted(zero, lora=None):
    t = Trainer(config(zero, model=MEDIUM, lora=lora or {"mode": "auto"}))
    for plan in (t.full, t.warmup, t.lora):
        if plan is not t.full:
            t.switch(plan)
        check_bytes(t)
    t.close()


def check_bytes(t, parked=frozenset()):
    """Take three steps, and compare the census of the last one, and after it, with what is predicted."""
    plan = t.engine.plan
    t.train(2)
    batches = t.batches()
    t.engine.backward(batches)
    at_backward = wait_until(lambda: census(t.engine), only_owned)
    t.engine.finish_step(lr=1e-3)
    t.step += 1
    del batches
    at_rest = wait_until(lambda: census(t.engine), only_owned)
    for measured, after_backward in ((at_backward, True), (at_rest, False)):
        predicted = vars(predict_bytes(plan, t.layout, t.engine.config.zero, t.world, after_backward=after_backward,
                                       kernel=t.engine.config.kernel(), parked=parked))
        for owner, expected in predicted.items():
            assert abs(measured[owner] - expected) <= 0.02 * expected, (plan.phase, owner, after_backward,
                                                                        predicted, measured)
        assert only_owned(measured), (plan.phase, measured)
        assert measured["state"] == 0 and set(measured) == set(OWNERS)


@pytest.mark.parametrize(("zero", "keys", "sent", "bytes_per_element"), [
    ("zero2", {}, "fp32", 2 * 2), ("zero2", {"overlap_comm": False}, "fp32", 2), ("zero3", {}, "fp32", 4),
    ("zero3", {}, "bf16", 2)])
def test_gradients_are_reduced_in_several_buckets_of_the_predicted_size(ranks, zero, keys, sent, bytes_per_element):
    ranks.run(buckets_as_predicted, zero=zero, keys=keys, sent=sent, bytes_per_element=bytes_per_element)


def buckets_as_predicted(**case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prelora_ds.cost.bytes, "LEAST_BUCKET", 1)  # so that a small model has several
        count_buckets(**case)


def count_buckets(zero, keys, sent, bytes_per_element):
    """Count the bytes of the buckets in the middle of a backward pass, and the gradients in each reduction."""
    from deepspeed.comm import comm

    t = Trainer(config(zero, model=MEDIUM, deepspeed={"zero_optimization": ZEROS[zero] | keys},
                       train={"reduce_dtype": sent}))
    collective = "reduce_scatter_tensor" if zero == "zero3" else "all_reduce"
    for plan in (t.full, t.lora):
        if plan is t.lora:
            t.switch(plan)
        t.train(2)
        elements = bucket_elements(plan, t.layout, t.engine.config.zero)
        sizes = [math.prod(plan.parameters(t.layout)[name]) for name in plan.trainable]
        assert elements == max(max(sizes), -(-sum(sizes) // 8))

        in_backward, reduced = [], []
        hook = named_parameters(t.engine.module)["vit.embeddings.cls_token"].register_hook(
            lambda _, t=t, counted=in_backward: counted.append(sum(map(bytes_of, t.engine.ds.optimizer
                                                                        .ipg_buckets.values()))))
        real = getattr(comm.cdb, collective)

        def counting(*args, reduced=reduced, real=real, **kwargs):
            reduced.append(max(a.numel() for a in (*args, *kwargs.values()) if hasattr(a, "numel")))
            return real(*args, **kwargs)

        setattr(comm.cdb, collective, counting)
        try:
            t.engine.backward(t.batches())
        finally:
            delattr(comm.cdb, collective)
        hook.remove()
        t.engine.finish_step(lr=1e-3)
        assert in_backward == [bytes_per_element * elements], (in_backward, elements)
        buckets = [count for count in reduced if count > 10]
        assert sum(buckets) == pytest.approx(sum(sizes), rel=0.01) and max(buckets) <= elements * 1.01
        assert sum(sizes) / elements <= len(buckets) <= 2 * sum(sizes) / elements + 1
    t.close()


def bytes_of(bucket):
    return sum(buffer.nbytes for buffer in (bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]))


@pytest.mark.parametrize(("lora", "zero"), [
    ({"mode": "merged"}, "zero0"), ({"mode": "merged"}, "zero2"), ({"train_a": False}, "zero2"),
    ({"train_a": False}, "zero3")])
def test_bytes_of_other_adapters_are_as_predicted(ranks, lora, zero):
    ranks.run(bytes_as_predicted, zero=zero, lora=lora)


RELORA = [
    {"name": "full", "until": "3 steps"},
    {"name": "relora", "adapters": {"rank": 32}, "train": ["adapters", "rest"], "until": "6 steps",
     "merge": {"every": "3 steps", "reset": {"rule": "magnitude", "share": 0.75}}},
    {"name": "joint", "adapters": {"rank": 8, "from": "merge"}, "train": "all", "until": "3 steps"},
    {"name": "lora", "train": ["adapters", "rest"]},
]
DYNA = [
    {"name": "full", "until": "3 steps"},
    {"name": "dyna", "adapters": {"rank": 32}, "train": ["adapters", "rest"],
     "active": {"choose": "random", "share": 0.5, "every": "3 steps"}},
]
CUT = [
    {"name": "full", "until": "3 steps"},
    {"name": "dyna", "adapters": {"rank": 32}, "train": ["adapters", "rest"],
     "active": {"choose": "random", "k": 2, "every": "3 steps", "cut_backward": True}},
]
ZERO_KERNELS = [*((zero, "branch") for zero in ZEROS), ("zero2", "merged")]


def only(*quick):
    """Return all settings, of which only ``quick`` are not marked as long."""
    return [setting if setting in quick else pytest.param(*setting, marks=pytest.mark.long)
            for setting in ZERO_KERNELS]


@pytest.mark.parametrize(("zero", "kernel"), only(("zero2", "branch")))
def test_bytes_of_every_phase_of_relora_are_as_predicted(ranks, zero, kernel):
    ranks.run(bytes_of_phases, zero=zero, kernel=kernel, phases=RELORA)


@pytest.mark.parametrize(("zero", "kernel"), only(("zero1", "branch"), ("zero3", "branch")))
def test_bytes_of_every_phase_of_dynalora_are_as_predicted(ranks, zero, kernel):
    ranks.run(bytes_of_phases, zero=zero, kernel=kernel, phases=DYNA)


@pytest.mark.parametrize("zero", ["zero1", pytest.param("zero3", marks=pytest.mark.long)])
def test_bytes_of_a_backward_pass_that_ends_early_are_as_predicted(ranks, zero):
    ranks.run(bytes_of_phases, zero=zero, kernel="branch", phases=CUT)


def bytes_of_phases(zero, kernel, phases):
    """Walk through ``phases`` as a run does, with one merge or one more choice of adapters where a phase has them."""
    t = Trainer(config(zero, model=MEDIUM, convergence=None, lora=None, phases=with_kernel(phases, kernel)))
    specs = t.cfg.specs()
    before = t.engine.plan
    for index, plan in enumerate(plans_at_rank(specs, t.layout)):
        parked = needed_in_fp32(specs, t.layout, index)
        if index:
            replaced = plan.cycle != before.cycle
            before = plan
            plan = replace(plan, cycle=t.engine.plan.cycle + replaced)
            edit = partial(fold_adapters, layout=t.layout) if replaced else None
            t.engine, _ = transition(t.engine, plan, edit=edit, parked=parked)
        check_bytes(t, parked)
        if (merge := specs[index].merge) is not None:
            assert kernel == "merged" or census(t.engine)["host"] > 0
            merge_adapters(t.engine, replace(plan, cycle=plan.cycle + 1), merge.reset)
            check_bytes(t, parked)
        if (selection := specs[index].selection) is not None:
            assert plan.training() < plan.trainable
            other = first_choice(selection, plan, t.layout, seed=1)
            chosen = with_active(plan, t.layout, other, cut_backward=selection.cut_backward)
            assert chosen.training() != plan.training()
            t.engine.set_active(chosen.training())
            check_bytes(t, parked)
    t.close()


def with_kernel(phases, kernel):
    return [{**phase, "adapters": {**phase["adapters"], "mode": kernel}} if "adapters" in phase else phase
            for phase in phases]
