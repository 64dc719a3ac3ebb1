"""Both switches at every ZeRO stage: what is released, what is carried over, what must not change."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.plans import lora_plan
from support.runs import MEDIUM, SMALL, ZEROS, Trainer, config, only_owned, same

from prelora_ds.core.adapters import Lora
from prelora_ds.cost.bytes import predict_bytes
from prelora_ds.engine import build as build_module
from prelora_ds.engine import restore as restore_module
from prelora_ds.engine.census import census, engine_storages, live_storages, rss_bytes, wait_until
from prelora_ds.engine.measure import check_ranks_agree, gathered, weight_norms
from prelora_ds.engine.release import release, trim_memory
from prelora_ds.engine.state import export_state
from prelora_ds.model.adapters import check_adapters, fp32_weights, initial_adapter_value
from prelora_ds.model.families import named_parameters

ALL = pytest.mark.parametrize("zero", ZEROS)


@ALL
def test_outputs_masters_moments_and_counters_are_carried_bitwise(ranks, zero):
    ranks.run(carry_over_both_switches, zero=zero)


def carry_over_both_switches(zero):
    t = Trainer(config(zero))
    t.train(3)
    for plan in (t.warmup, t.lora):
        before, state, counters = t.outputs(), t.whole_state(), t.engine.counters()
        t.switch(plan)
        assert torch.equal(before, t.outputs())
        assert t.engine.counters() == counters
        assert counters.global_steps == t.step and counters.global_samples == t.step * t.cfg.train.global_batch_size
        carried = {key: value for key, value in state.items() if key[0] in plan.trainable}
        after = t.whole_state()
        fresh = {key for key in after if key not in carried}
        if plan is t.warmup:  # the new adapters have an initial value but no moments yet
            assert {what for _, what in fresh} == {"master"} and all(".lora_" in name for name, _ in fresh)
            assert {name for name, _ in fresh} == plan.trainable - set(t.layout.parameters)
        else:
            assert not fresh
        assert same(carried, {key: after[key] for key in carried}) == []
        check_adapters(t.engine.module, plan)
        t.train(3)
    steps = {name: value for (name, what), value in t.whole_state().items() if what == "step"}
    assert steps.keys() == t.lora.trainable
    # The adapters began at step 3; the other parameters have trained from step 0.
    assert {value for name, value in steps.items() if ".lora_" in name} == {6}
    assert {value for name, value in steps.items() if ".lora_" not in name} == {9}
    t.close()


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_checkpointed_activations_change_no_step_and_survive_switches(ranks, zero):
    ranks.run(checkpointed_run, zero=zero)


def checkpointed_run(zero):
    runs = []
    for checkpointed in (False, True):
        t = Trainer(config(zero, model={**MEDIUM, "activation_checkpointing": checkpointed}))
        losses = t.train(2)
        for plan in (t.warmup, t.lora):
            t.switch(plan)
            losses += t.train(2)
        runs.append((losses, t.whole_state()))
        t.close()
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1]) == []


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_compiled_blocks_survive_switches_with_no_break_in_a_graph(own_ranks, zero):
    own_ranks.run(compiled_run, zero=zero)  # tensors that the compiler keeps would disturb the census of later tests


def compiled_run(zero):
    """Capture, differentiate and run graphs as they are; inductor is tested without ranks."""
    runs, graphs, compile = [], [], torch.compile
    torch.compile = partial(compile, backend="aot_eager")
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        t = Trainer(config(zero, model={**SMALL, "num_hidden_layers": 2, "compile": compiled}))
        losses = t.train(2)
        for plan in (t.warmup, t.lora, lora_plan(t.layout, t.warmup, train_rest=False)):
            t.switch(plan)
            losses += t.train(2)
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"] and not counters["unimplemented"]
        graphs.append(counters["stats"]["unique_graphs"])
        runs.append(losses)
        t.close()
    torch.compile = compile
    assert graphs[0] == 0 and graphs[1] >= 3, graphs  # at least one per phase
    torch.testing.assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]), rtol=0.01, atol=0)  # bf16, decomposed


@pytest.mark.parametrize(("before", "after"), [("zero3", "zero1"), ("zero2", "zero3"), ("zero2_offload", "zero0")])
def test_a_phase_may_have_its_own_stage_and_micro_batch(ranks, before, after):
    ranks.run(own_settings, before=before, after=after)


def own_settings(before, after):
    """The state is carried bitwise between stages, and the bytes are those of the new stage.

    So are the outputs, if stage 3 computes with torch's own linear (`memory_efficient_linear`).
    """
    torch_linear = {"memory_efficient_linear": False}
    own = {"deepspeed": {"zero_optimization": ZEROS[after] | torch_linear}, "micro_batch_size": 8}
    deepspeed = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": ZEROS[before] | torch_linear}
    t = Trainer(config(before, model=MEDIUM, batch=16, deepspeed=deepspeed, phases={"lora": own}))
    t.train(2)
    t.switch(t.warmup)
    t.train(2)
    outputs, state = t.outputs(), t.whole_state()
    t.switch(t.lora)
    assert torch.equal(outputs, t.outputs())
    carried = {key: value for key, value in state.items() if key[0] in t.lora.trainable}
    assert same(carried, t.whole_state()) == []
    assert t.engine.config.zero.stage == ZEROS[after]["stage"] and t.engine.ds.gradient_accumulation_steps() == 1
    t.cfg = t.engine.config  # micro-batches as the loader would split them
    t.train(3)
    t.engine.backward(t.batches())
    measured = wait_until(lambda: census(t.engine), only_owned)
    predicted = vars(predict_bytes(t.lora, t.layout, t.engine.config.zero, t.world, after_backward=True))
    t.engine.finish_step(lr=1e-3)
    for owner, expected in predicted.items():
        assert abs(measured[owner] - expected) <= 0.02 * expected, (owner, predicted, measured)
    t.close()


@ALL
def test_the_old_engine_is_gone_and_its_pages_are_released(own_ranks, zero):
    own_ranks.run(old_engine_is_gone, zero=zero)


def old_engine_is_gone(zero):
    """Test the engines that the two switches release: of the full phase and of the warm-up."""
    cfg = config(zero, model={**MEDIUM, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8})
    for warm in (False, True):
        t = Trainer(cfg)
        if warm:
            t.switch(t.warmup)
        t.train(3)
        dead, held = weakref.ref(t.engine.ds), engine_storages(t.engine)
        trim_memory()
        rss = rss_bytes()
        release(t.engine)
        freed, given_back = sum(held.values()), rss - rss_bytes()  # before the scan of all objects takes memory
        assert dead() is None
        assert not held.keys() & live_storages().keys()
        assert freed > 100e6 and given_back >= 0.98 * freed, (warm, freed, given_back)


@ALL
def test_memory_during_a_switch_stays_below_the_full_phase(ranks, zero):
    ranks.run(memory_during_a_switch, zero=zero)


def memory_during_a_switch(zero):
    t = Trainer(config(zero, model=MEDIUM, micro=8, batch=16))
    t.train(2)
    peak = peak_of_a_step(t)
    for plan in (t.warmup, t.lora):
        shapes = t.engine.plan.parameters(t.layout)
        # A rank's share of 12 bytes per trained parameter, and one full parameter.
        share = 12 * sum(torch.Size(shapes[name]).numel() for name in t.engine.plan.trainable) / t.world
        largest = 4 * max(torch.Size(shape).numel() for shape in shapes.values())
        samples = []
        original = restore_module.gather_full

        def sampled(state, name, *args, samples=samples, original=original):
            full = original(state, name, *args)
            if name.endswith("weight") and ".layers.1." not in name:  # often enough; a census is slow
                samples.append(census(None, state) | {"staging": full.nbytes})
            return full

        restore = build_module.restore_state

        def sampled_first(ds, plan, layout, state, *, parked, samples=samples, restore=restore):
            samples.append(census(None, state) | {"staging": 0})  # the new engine as built by DeepSpeed
            return restore(ds, plan, layout, state, parked=parked)

        restore_module.gather_full, build_module.restore_state = sampled, sampled_first
        try:
            t.switch(plan)
        finally:
            restore_module.gather_full, build_module.restore_state = original, restore
        assert len(samples) > 50
        for s in samples:
            device = sum(s.values()) - s["staging"] - s["state"]
            assert device <= peak, (plan.phase, device, peak)
            assert s["state"] + s["staging"] <= 1.01 * share + largest + 4096, (s, share, largest)
        t.train(3)
    t.close()


def peak_of_a_step(t):
    """Return the live bytes between forward and backward, including activations.

    Python's garbage collector cannot see activations.
    """
    weights = {p.untyped_storage()._cdata for p in t.engine.module.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        t.engine.backward(t.batches())
    at_rest = sum(census(t.engine).values())
    t.engine.finish_step(lr=1e-3)
    assert sum(saved.values()) > 1e6
    return at_rest + sum(saved.values())


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero2_offload"])
def test_merged_trains_on_the_exact_fp32_base(ranks, zero):
    ranks.run(train_merged, zero=zero)


def train_merged(zero):
    """Compare with the same run in mode branch, which trains on bf16(W)."""
    runs = {}
    for mode in ("branch", "merged"):
        t = Trainer(config(zero, lora={"mode": mode}))
        t.train(3)
        t.switch(t.warmup)
        t.train(3)
        before, masters = t.outputs(), t.whole_state()
        t.switch(t.lora)
        assert float((t.outputs() - before).abs().max()) <= (0 if mode == "branch" else 2 ** -6) * before.abs().max()
        losses = t.train(6)
        kept = {name: base.clone() for name, base in fp32_weights(t.engine.module).items()}
        assert kept.keys() == ({f"{path}.weight" for path in t.lora.adapters} if mode == "merged" else set())
        for name, base in kept.items():
            assert torch.equal(base.view(-1), masters[name, "master"]), name
        norms = weight_norms(t.engine).effective
        if mode == "merged":  # a rebuild keeps the fp32 base and the adapters bitwise
            state, after = t.whole_state(), t.outputs()
            t.switch(t.lora)
            assert torch.equal(after, t.outputs()) and same(state, t.whole_state()) == []
            assert all(torch.equal(base, kept[name]) for name, base in fp32_weights(t.engine.module).items())
            assert norms == weight_norms(t.engine).effective
        runs[mode] = losses, norms
        t.close()
    (branch, norms), (merged, merged_norms) = runs.values()
    assert merged == pytest.approx(branch, rel=5e-3)
    for family, layers in norms.items():
        assert merged_norms[family] == pytest.approx(layers, rel=2 ** -9)


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_lora_fa_leaves_every_a_as_it_was(ranks, zero):
    ranks.run(train_fa, zero=zero)


def train_fa(zero):
    t = Trainer(config(zero, lora={"train_a": False}))
    t.train(2)
    for plan in (t.warmup, t.lora):
        before = t.outputs()
        t.switch(plan)
        assert torch.equal(before, t.outputs())
        leaves = plan.leaves(t.layout)
        names = [name for name, (_, leaf) in leaves.items() if leaf == Lora.A]
        with gathered(t.engine, [named_parameters(t.engine.module)[name] for name in names]) as values:
            for name, value in zip(names, values, strict=True):
                assert torch.equal(value, initial_adapter_value(name, value.shape, plan, leaves).bfloat16()), name
        del values, value  # otherwise they outlive the engine, and the next switch fails
        assert not {name for name, _ in t.snapshot()} & set(names)
        t.train(3)
    t.close()


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_an_export_is_one_rank_s_share(ranks, zero):
    shares = ranks.run(export_bytes, zero=zero)
    assert sum(n for n, _ in shares) == shares[0][1]  # disjoint and whole
    assert max(n for n, _ in shares) < 0.51 * shares[0][1]


def export_bytes(zero):
    t = Trainer(config(zero))
    t.train(1)
    total = 12 * sum(torch.Size(s).numel() for s in t.layout.parameters.values())
    exported = export_state(t.engine.ds)
    release(t.engine)
    gc.collect()
    return exported.host_bytes(), total


def test_ranks_that_differ_are_named(ranks):
    messages = ranks.run(one_rank_differs)
    assert all("parameters of ranks [1] differ from rank 0" in message for message in messages)


def one_rank_differs():
    t = Trainer(config("zero2"))
    check_ranks_agree(t.engine)
    if t.rank == 1:
        next(t.engine.module.parameters()).data.view(-1)[0] += 1
    with pytest.raises(RuntimeError) as caught:
        check_ranks_agree(t.engine)
    t.close()
    return str(caught.value)


def test_optimizer_groups_are_one_per_decay_rate_and_adapter(ranks):
    ranks.run(optimizer_groups)


def optimizer_groups():
    t = Trainer(config("zero2", optimizer={"weight_decay": 0.3}, lora={"weight_decay": 0.01, "lr_scale": 4.0}))
    settings = []
    for plan, spec in zip((t.full, t.warmup, t.lora), t.cfg.specs(), strict=True):
        if plan is not t.full:
            t.switch(replace(plan, lr_scale=spec.lr_scale))
        t.train(1)
        settings.append(sorted((g["weight_decay"], g["lr"]) for g in t.engine.ds.optimizer.param_groups))
    # Matrices with decay, the rest, and adapters with their own rate; in the LoRA phase all use that rate.
    assert settings[0] == [(0.0, 1e-3), (0.3, 1e-3)]
    assert settings[1] == [(0.0, 1e-3), (0.01, 4e-3), (0.3, 1e-3)]
    assert settings[2] == [(0.0, 4e-3), (0.01, 4e-3), (0.3, 4e-3)]
    t.close()
    t = Trainer(config("zero2", optimizer={"weight_decay": 0.0}), begin="lora")
    names = {id(p): name for name, p in named_parameters(t.engine.module).items()}
    kinds = [{".lora_" in names[id(p)] for p in group} for group in t.engine.ds.optimizer.bit16_groups]
    assert sorted(kinds) == [{False}, {True}], "adapters and the rest share a flat tensor"
    t.close()


def test_a_step_after_a_rebuild_has_all_its_micro_batches_after_any_accumulation(ranks):
    ranks.run(accumulated_otherwise)


def accumulated_otherwise():
    """Run three steps of one micro-batch, then steps of four: 3 is not a multiple of 4."""
    norms = []
    for own in ({}, {"micro_batch_size": 2}):
        t = Trainer(config("zero2", micro=8, batch=16, phases={"warmup": own}))
        t.train(3)
        t.switch(t.warmup)
        accum = t.engine.ds.gradient_accumulation_steps()
        assert (accum, t.engine.ds.micro_steps % accum) == (8 // own.get("micro_batch_size", 8), 0)
        batches = t.batches()
        images, labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
        size = len(images) // accum
        rows = [type(batches[0])(images[i:i + size], labels[i:i + size]) for i in range(0, len(images), size)]
        t.engine.backward(rows)
        norms.append(t.engine.finish_step(lr=1e-3).grad_norm)
        assert t.engine.ds.global_steps == 4
        t.close()
    assert norms[1] == pytest.approx(norms[0], rel=2e-2)
