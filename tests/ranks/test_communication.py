"""The payloads predicted by `cost.flops.communication`, and what DeepSpeed passes to its backend."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from support.runs import MEDIUM, ZEROS, Trainer, config

from prelora_ds.core.merge import Reset
from prelora_ds.core.selection import with_active
from prelora_ds.cost.flops import communication
from prelora_ds.cost.merging import merge_work
from prelora_ds.engine.merge import merge_adapters
from prelora_ds.engine.transition import transition

SENT = {"all_reduce": "all_reduce", "all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}


@pytest.mark.parametrize(("zero", "accum", "keys"), [
    ("zero0", 1, {}), ("zero1", 2, {}), ("zero2", 2, {}), ("zero3", 2, {}),
    ("zero3", 1, {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0,
                  "stage3_max_reuse_distance": 0}),
])
def test_payloads_are_as_predicted(ranks, zero, accum, keys):
    ranks.run(payloads_as_predicted, zero=zero, accum=accum, keys=keys)


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_payloads_in_bf16_are_half_of_those_in_fp32_at_every_stage(ranks, zero):
    ranks.run(half_payloads, zero=zero)


def half_payloads(zero):
    sent, norms = [], []
    for dtype in ("fp32", "bf16"):
        t = Trainer(config(zero, train={"reduce_dtype": dtype}))
        assert t.engine.config.zero.reduce_bytes == (4 if dtype == "fp32" else 2)
        stats = []
        of_gradients = sent_by(lambda t=t, stats=stats: stats.append(t.engine.train_step(t.batches(), lr=0.0)))
        gradients = "reduce_scatter" if zero == "zero3" else "all_reduce"
        sent.append(of_gradients[SENT[gradients]])
        predicted = communication(t.full, t.layout, t.engine.config.zero, 1)
        assert sent[-1] == pytest.approx(getattr(predicted, gradients), rel=0.01, abs=200)
        norms.append(stats[0].grad_norm)
        t.close()
    assert sent[1] == pytest.approx(sent[0] / 2, rel=0.01, abs=200)
    assert norms[1] == pytest.approx(norms[0], rel=0.01)
    # Stage 0 rounds each sum to BF16 in either case, and a sum of two is rounded alike.
    assert (norms[0] == norms[1]) == (zero == "zero0")


def payloads_as_predicted(zero, accum, keys):
    for chooses in (False, True):
        t = Trainer(config(zero, model=MEDIUM, batch=8 * accum, chooses=chooses,
                           deepspeed={"zero_optimization": ZEROS[zero] | keys}), begin="lora" if chooses else "full")
        dyna = with_active(t.lora, t.layout, frozenset(sorted(t.lora.adapters)[::2]), cut_backward=False)
        for plan in (t.lora, dyna) if chooses else (t.full, t.lora):
            if plan is t.lora and not chooses:
                t.switch(plan)
            t.engine.set_active(plan.training())
            t.train(3)  # ZeRO-3 records its trace first
            bytes_sent = sent_by(lambda t=t: t.train(1))
            predicted = communication(plan, t.layout, t.cfg.zero, accum,
                                      reuse_distance=keys.get("stage3_max_reuse_distance", 10**9))
            for term, name in SENT.items():
                assert bytes_sent[name] == pytest.approx(getattr(predicted, term), rel=0.01, abs=100), (plan, term)
        t.close()


@pytest.mark.parametrize(("zero", "rule"), [("zero0", "zero"), ("zero2", "zero"), ("zero2", "magnitude"),
                                            ("zero3", "zero")])
def test_the_payload_of_a_merge_is_as_predicted(ranks, zero, rule):
    ranks.run(payload_of_a_merge, zero=zero, rule=rule)


def payload_of_a_merge(zero, rule):
    t = Trainer(config(zero, deepspeed={"zero_optimization": ZEROS[zero] | {"stage3_param_persistence_threshold": 0}}))
    t.engine, _ = transition(t.engine, t.lora, parked=frozenset(f"{path}.weight" for path in t.lora.adapters))
    t.train(2)
    reset = Reset(rule, 1.0 if rule == "zero" else 0.5)
    bytes_sent = sent_by(lambda: merge_adapters(t.engine, replace(t.lora, cycle=1), reset))
    predicted = merge_work(t.cfg.model, t.lora, t.layout, reset, t.cfg.zero, t.world, kernel="branch")
    assert bytes_sent["all_reduce"] == pytest.approx(predicted.all_reduce, abs=100)
    t.close()


def sent_by(run):
    """The bytes that each collective of DeepSpeed's backend is given while ``run()`` runs."""
    from deepspeed.comm import comm

    bytes_sent = Counter()
    for name in SENT.values():
        setattr(comm.cdb, name, counted(getattr(comm.cdb, name), name, bytes_sent))
    try:
        run()
    finally:
        for name in SENT.values():
            delattr(comm.cdb, name)
    return bytes_sent


def counted(collective, name, bytes_sent):
    def run(*args, **kwargs):
        tensors = [a for a in (*args, *kwargs.values()) if hasattr(a, "nbytes")]
        bytes_sent[name] += max(tensor.nbytes for tensor in tensors)
        return collective(*args, **kwargs)

    return run
