"""Switches, steps and resumes on the accelerator. G3 ... are the numbers of the checks in docs/first-gpu.md."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from math import isfinite

import pytest
import torch
from ranks.test_active import one_adapter
from ranks.test_bytes import bytes_as_predicted
from ranks.test_switch import carry_over_both_switches, train_fa, train_merged
from ranks.test_zero_keys import switches_in_another_order
from support.pool import RankPool
from support.runs import MEDIUM, SMALL, ZEROS, Trainer, config, same

from prelora_ds.engine.build import build_engine
from prelora_ds.engine.census import engine_storages
from prelora_ds.engine.fragments import Fragment
from prelora_ds.engine.optimizer import TorchAdamByName, inner_optimizer
from prelora_ds.engine.release import release, trim_memory
from prelora_ds.engine.rng import capture_rng, restore_rng
from prelora_ds.engine.runtime import compute_deterministically, device, init_process_group
from prelora_ds.engine.state import copy_state, export_state

GPU = pytest.mark.gpu
MIB = 2**20
# Large enough that a step takes memory beside the states.
WIDE = {**MEDIUM, "image_size": 64, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
# What a host may wait for in a step of one micro-batch at stage 2. Counted on the CPU (tests/ranks/test_waits.py) it is
# 2 in our code, and 1 per optimizer group in DeepSpeed; on a GPU it has not been counted (docs/first-gpu.md asks for
# the number).
MOST_SYNCHRONISATIONS = 6


@contextlib.contextmanager
def deterministic():
    compute_deterministically()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---- G3: switches carry every bit, and bytes are as predicted


@GPU
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("check", [carry_over_both_switches, bytes_as_predicted])
def test_g3_switches_and_bytes(each, check, zero):
    if zero == "zero0" and each.world_size == 1:
        pytest.skip("one rank would have to accumulate, which stage 0 does not")
    each.run(check, zero=zero)


@GPU
@pytest.mark.parametrize("check", [train_merged, train_fa])
def test_g3_other_kernels(two, check):
    two.run(check, zero="zero2")


# ---- G4, G5: memory is given back


@GPU
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_g4_a_switch_gives_memory_back_to_the_device(one, zero):
    one.run(memory_given_back, zero=zero)


def memory_given_back(zero):
    t = Trainer(config(zero, model=WIDE, micro=32, batch=32 * torch.distributed.get_world_size()))
    t.train(2)
    torch.cuda.reset_peak_memory_stats()
    t.train(1)
    peak_of_a_step = torch.cuda.max_memory_allocated()

    torch.cuda.reset_peak_memory_stats()
    t.switch(t.warmup)
    assert torch.cuda.max_memory_allocated() < peak_of_a_step
    t.train(1)

    held = sum(engine_storages(t.engine).values())
    before = torch.cuda.memory_allocated()
    state = export_state(t.engine.ds)
    release(t.engine)
    trim_memory()
    assert before - torch.cuda.memory_allocated() >= 0.98 * held
    assert torch.cuda.memory_reserved() <= torch.cuda.memory_allocated() + 64 * MIB
    del state


@GPU
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_g5_ten_rebuilds_leave_nothing_on_the_device(each, zero):
    each.run(ten_rebuilds, zero=zero)


def ten_rebuilds(zero):
    t = Trainer(config(zero, model=WIDE))

    def what_is_used():
        gc.collect()
        trim_memory()
        free, total = torch.cuda.mem_get_info()
        return total - free, len(torch.distributed.distributed_c10d._world.pg_map), threading.active_count()

    for _ in range(2):
        t.switch(t.full)
        t.train(1)
    used, groups, threads = what_is_used()
    for _ in range(10):
        t.switch(t.full)
        t.train(1)
    later, later_groups, later_threads = what_is_used()
    assert later - used < 64 * MIB, f"{(later - used) / MIB:.0f} MiB more"
    assert (later_groups, later_threads) == (groups, threads)
    t.close()


# ---- G6: collectives that overlap the backward pass change no bit


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=GPU)])
def test_g6_overlapping_collectives_change_no_bit(two, compiled):
    on_gpu = torch.cuda.is_available()
    two.run(overlapping, steps=20 if on_gpu else 2, model=MEDIUM if on_gpu else SMALL,
                bucket=65536 if on_gpu else 8192, compiled=compiled)


def overlapping(steps, model, bucket, compiled):
    runs = []
    with deterministic():
        for overlap in (False, True):
            zero = {"stage": 2, "overlap_comm": overlap, "reduce_bucket_size": bucket}
            t = Trainer(config("zero2", model={**model, "compile": compiled},
                               deepspeed={"zero_optimization": zero}))
            norms = []
            for _ in range(steps):
                norms.append(t.engine.train_step(t.batches(), lr=1e-3).grad_norm)
                t.step += 1
            assert sum(p.numel() for p in t.engine.module.parameters()) > 10 * bucket
            runs.append((norms, t.whole_state()))
            t.close()
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1]) == []


@GPU
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_g6_one_active_adapter_with_overlapping_collectives(two, zero):
    two.run(one_adapter, zero=zero)


# ---- G7: the fused kernel of AdamW


def test_g7_the_fused_kernel_agrees_with_the_others_also_after_a_rebuild(one):
    one.run(fused_adam)


def fused_adam():
    sizes = {"a": 500, "b": 3, "c": 1000}
    flats = [torch.randn(sum(sizes.values()), device=device(), generator=torch.Generator(device()).manual_seed(0))
             for _ in range(2)]
    optimizers = []
    for flat, fused in zip(flats, (False, True), strict=True):
        optimizer = TorchAdamByName([flat], lr=1e-3, weight_decay=0.1, fused=fused)
        starts = {"a": 0, "b": 500, "c": 503}
        optimizer.bind([(flat, [*sizes])], [Fragment(name, 0, sizes[name], flat, starts[name]) for name in sizes])
        optimizers.append(optimizer)
    for step in range(5):
        for flat, optimizer in zip(flats, optimizers, strict=True):
            optimizer.active = None if step % 2 else frozenset("ac")  # so that the steps of names differ
            generator = torch.Generator(device()).manual_seed(step)
            flat.grad = torch.randn(flat.shape, device=device(), generator=generator)
            optimizer.step()
    torch.testing.assert_close(flats[1], flats[0], rtol=1e-6, atol=1e-7)

    t = Trainer(config("zero2"))
    for plan in (t.full, t.warmup):
        if plan is not t.full:
            t.switch(plan)
        groups = inner_optimizer(t.engine.ds).param_groups
        assert all(group["fused"] or device().type == "cpu" for group in groups)
        for group in groups:
            group["fused"] = True
        assert all(map(isfinite, t.train(2)))
    t.close()


# ---- G9: every stage trains as the CPU does


@GPU
@pytest.mark.parametrize("zero", [zero for zero in ZEROS if "offload" not in zero])
def test_g9_every_stage_trains_as_the_cpu_does(two, on_the_cpu, zero):
    expected = on_the_cpu.run(losses_of_8_steps, zero=zero)[0]
    assert two.run(losses_of_8_steps, zero=zero)[0] == pytest.approx(expected, rel=1e-2)


@pytest.fixture(scope="module")
def on_the_cpu():
    """Two ranks on the CPU."""
    pool = RankPool(2, {"DS_ACCELERATOR": "cpu"})
    yield pool
    pool.close()


def losses_of_8_steps(zero):
    t = Trainer(config(zero, model=MEDIUM, batch=24, micro=24 // torch.distributed.get_world_size()))
    losses = t.train(8)
    t.close()
    return losses


@pytest.mark.parametrize("zero", [pytest.param(zero, marks=[] if zero == "zero2" else GPU) for zero in ZEROS])
def test_g9_a_skipped_update_changes_no_bit(two, zero):
    two.run(skipped_update, zero=zero)


def skipped_update(zero):
    t = Trainer(config(zero))
    t.train(2)
    before = t.whole_state()
    t.engine.backward(t.batches())
    assert t.engine.finish_step(lr=1e-3, accept=lambda loss: False).skipped
    assert same(before, t.whole_state()) == []
    t.close()


# ---- G10: how often a step waits for the device


@GPU
def test_g10_a_step_seldom_waits_for_the_device(one, record_property):
    waits = one.run(synchronisations_of_a_step)[0]
    record_property("synchronisations", waits)
    print(f"G10: a step waits {waits} times for the device")
    assert waits <= MOST_SYNCHRONISATIONS


def synchronisations_of_a_step():
    """Return what torch warns of, and the explicit waits, in one step."""
    t = Trainer(config("zero2", model=MEDIUM))
    t.train(3)
    batches = [type(batch)(batch.images.pin_memory(), batch.labels.pin_memory()) for batch in t.batches()]
    explicit = []
    waiting = torch.cuda.synchronize
    torch.cuda.synchronize = lambda *args: (explicit.append(args), waiting(*args))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            t.engine.train_step(batches, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize = waiting
    t.close()
    return len(explicit) + sum("synchroniz" in str(warning.message) for warning in warned)


# ---- G11: a resumed run


def test_g11_a_resumed_run_with_dropout_is_the_same_to_the_bit_in_deterministic_mode(two):
    two.run(resumed)


def test_g11_a_loop_of_ones_own_asks_for_deterministic_mode_when_a_group_exists(one):
    one.run(asked_for)


def asked_for():
    assert torch.distributed.is_initialized() and not torch.are_deterministic_algorithms_enabled()
    try:
        init_process_group(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def resumed():
    with deterministic():
        torch.manual_seed(7)
        cfg = config("zero2", model={**SMALL, "hidden_dropout_prob": 0.1})
        straight = Trainer(cfg)
        straight.train(2)
        saved, random = copy_state(straight.engine.ds), capture_rng()
        assert ("cuda" in random) == torch.cuda.is_available()
        expected = straight.train(3)
        reference, counters = straight.whole_state(), straight.engine.counters()
        straight.close()

        other = Trainer(cfg)
        other.close()
        other.engine = build_engine(cfg, other.full, other.layout, other.engine.num_labels, saved, counters)
        other.step = 2
        restore_rng(random)
        assert other.train(3) == expected
        assert same(reference, other.whole_state()) == []
        other.close()


# ---- G13: compiled blocks


@GPU
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_g13_blocks_that_inductor_compiles_train_as_the_others(one, zero):
    one.run(compiled_by_inductor, zero=zero)


def compiled_by_inductor(zero):
    runs = []
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        t = Trainer(config(zero, model={**MEDIUM, "num_hidden_layers": 2, "compile": compiled}))
        losses = t.train(2)
        for plan in (t.warmup, t.lora):
            t.switch(plan)
            losses += t.train(2)
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"] and not counters["unimplemented"]
        runs.append(losses)
        t.close()
    assert runs[1] == pytest.approx(runs[0], rel=1e-2)


# ---- G18: masters where DeepSpeed reorders parameters


@GPU
@pytest.mark.parametrize("zero", ["zero1", "zero2"])
def test_g18_masters_survive_switches_where_deepspeed_reorders_parameters(two, zero):
    two.run(switches_in_another_order, zero=zero)
