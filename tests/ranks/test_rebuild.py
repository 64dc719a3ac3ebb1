"""Repeated rebuilds with the same plan change nothing and leave nothing behind."""

from __future__ import annotations

import gc
import os
import threading
from datetime import timedelta
from statistics import median

import pytest
import torch
from support.runs import SMALL, ZEROS, Trainer, config, same

from prelora_ds.engine.census import census, rss_bytes
from prelora_ds.engine.release import trim_memory
from prelora_ds.engine.runtime import share_timeout

STEPS = 20
LONG = ("zero1", "zero2_offload", "zero3")  # run by `make test-long`


@pytest.mark.parametrize("zero", [
    pytest.param(zero, marks=pytest.mark.long) if zero in LONG else zero for zero in ZEROS])
def test_a_null_transition_after_each_of_20_steps_changes_nothing_and_leaves_nothing(own_ranks, zero):
    """Offload uses torch's AdamW, too (zero_force_ds_cpu_optimizer false)."""
    own_ranks.run(null_transitions, zero=zero)


def null_transitions(zero):
    cfg = config(zero, model={**SMALL, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2,
                              "hidden_dropout_prob": 0.1}, deepspeed={"zero_force_ds_cpu_optimizer": False})
    torch.manual_seed(7)
    straight = Trainer(cfg)
    losses = straight.train(STEPS)
    state = straight.whole_state()
    straight.close()

    torch.manual_seed(7)
    t = Trainer(cfg)
    rebuilt, left, rss, collected = [], [], [], gc.get_threshold()
    for step in range(STEPS):
        gc.set_threshold((50, 200, 700)[step % 3], 2 + 8 * (step % 2), 2)  # this changes what one collection leaves
        rebuilt += t.train(1)
        t.switch(t.full)
        left.append(what_lives())
        trim_memory()
        rss.append(rss_bytes())
    assert rebuilt == losses
    # The number of Python objects that torch keeps for its tensors varies by a few; one per rebuild would
    # show up as fifteen.
    for what in left[0]:
        counts = [here[what] for here in left]
        assert min(counts[-5:]) <= max(counts[:5]), (what, counts)
    # A leaked engine per rebuild would add ten times its bytes between the two medians.
    assert median(rss[-5:]) - median(rss[5:10]) < 0.5 * sum(census(t.engine).values()), rss
    assert same(t.whole_state(), state) == []
    assert len(state) == 4 * len(t.layout.parameters)
    gc.set_threshold(*collected)
    t.close()


@pytest.mark.parametrize("zero", ["zero2_offload", "zero3_offload"])
def test_with_cpu_adam_the_state_is_carried_bitwise_and_later_steps_stay_close(ranks, zero):
    ranks.run(cpu_adam, zero=zero)


def cpu_adam(zero):
    straight = Trainer(config(zero))
    start = straight.whole_state()
    losses = straight.train(STEPS)
    reference = straight.whole_state()
    straight.close()
    t, rebuilt = Trainer(config(zero)), []
    for step in range(1, STEPS + 1):
        rebuilt += t.train(1)
        if step in (1, 3, 9, 19):  # where running products of the betas and pow(beta, step) differ in fp32
            before = t.whole_state()
            t.switch(t.full)
            assert same(before, t.whole_state()) == []
    # Adam turns the last bit of a gradient that is only noise (a key's bias) into a full step, so single
    # weights may diverge, but not the run as a whole: losses agree within 0.5 %, and weights within 5 % of
    # the distance that they moved.
    assert rebuilt == pytest.approx(losses, rel=5e-3)
    after, masters = t.whole_state(), [key for key in reference if key[1] == "master"]
    parted = sum(float((after[k] - reference[k]).square().sum()) for k in masters) ** 0.5
    went = sum(float((reference[k] - start[k]).square().sum()) for k in masters) ** 0.5
    t.close()
    assert parted <= 0.05 * went, (parted, went)
    return parted / went


def what_lives():
    """Count everything that a rebuild could leave behind, except resident memory."""
    gc.collect()
    return {"tensors": sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()),
            "bytes": sum(census().values()), "python threads": threading.active_count(),
            "threads": len(os.listdir("/proc/self/task")), "files": len(os.listdir("/proc/self/fd")),
            "groups": len(torch.distributed.distributed_c10d._world.pg_map)}


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_gradients_are_accumulated_and_reduced_in_fp32(ranks, zero):
    ranks.run(gradient_sums, zero=zero)


def gradient_sums(zero):
    """Compare the accumulated gradient of two ranks, with two micro-batches each, with an fp32 sum.

    The sum is over the BF16 gradients of one backward pass per micro-batch.
    """
    from deepspeed import comm
    from deepspeed.utils import safe_get_full_grad

    from prelora_ds.model.families import named_parameters

    t = Trainer(config(zero, micro=4, batch=16))
    t.engine.backward(t.batches())
    names = ["vit.layers.0.attention.q_proj.weight", "vit.layers.2.mlp.fc2.weight", "classifier.weight"]
    got = {n: safe_get_full_grad(named_parameters(t.engine.module)[n]).float().cpu().clone() for n in names}
    t.close()

    alone = Trainer(config("zero0", micro=4, batch=8))
    batches = alone_batches(t)
    expected = {n: torch.zeros_like(g) for n, g in got.items()}
    worst_bf16 = {n: torch.zeros_like(g, dtype=torch.bfloat16) for n, g in got.items()}
    module = alone.engine.module
    for images, labels, *_ in batches:
        module.zero_grad()
        logits = module(alone.engine.prepare(images)).logits
        (torch.nn.functional.cross_entropy(logits.float(), labels) / 2).backward()
        for n in names:
            g = named_parameters(module)[n].grad
            expected[n] += g.float()
            worst_bf16[n] += g
    module.zero_grad()
    for n in names:
        comm.all_reduce(expected[n])
        expected[n] /= t.world
        comm.all_reduce(worst_bf16[n])
        error = (got[n] - expected[n]).abs().max() / expected[n].abs().max()
        in_bf16 = (worst_bf16[n].float() / t.world - expected[n]).abs().max() / expected[n].abs().max()
        assert error <= 2e-7, (n, float(error))
        assert in_bf16 > 1e-4, "the test would not see a sum in BF16"
    alone.close()


def alone_batches(t):
    from support.runs import micro_batches

    return micro_batches(t.cfg, 0, t.rank, t.world)


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_one_micro_batch_of_16_and_two_of_8_give_the_same_run(ranks, zero):
    """They agree up to the BF16 rounding of each micro-batch's gradient, which precedes accumulation."""
    ranks.run(same_run, zero=zero)


def same_run(zero):
    runs = []
    for micro in (16, 8):
        t = Trainer(config(zero, micro=micro, batch=32))
        runs.append((t.train(10), t.whole_state()))
        t.close()
    (losses_1, state_1), (losses_2, state_2) = runs
    assert max(abs(a - b) for a, b in zip(losses_1, losses_2, strict=True)) < 5e-3
    moved = max(float((state_1[k] - state_2[k]).norm() / state_1[k].norm()) for k in state_1
                if k[1] == "exp_avg" and "weight" in k[0])
    assert moved < 0.05


def test_deepspeeds_own_groups_wait_as_long_as_the_default_one(ranks):
    ranks.run(timeouts_of_groups)


def timeouts_of_groups():
    """Torch's default for a group of DeepSpeed's would end a rank before the guard."""
    t = Trainer(config("zero2"))
    groups = list(torch.distributed.distributed_c10d._world.pg_map)

    def timeouts():
        return {group._get_backend(torch.device(t.engine.ds.device)).options._timeout for group in groups}

    before = timeouts().pop()
    torch.distributed.set_timeout(before + timedelta(seconds=7))  # of the default group alone
    assert len(groups) > 1 and len(timeouts()) == 2
    share_timeout()
    assert timeouts() == {before + timedelta(seconds=7)}
    torch.distributed.set_timeout(before)
    share_timeout()
    t.close()
