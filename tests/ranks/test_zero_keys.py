"""Every accepted key of DeepSpeed's ZeRO section, set to another value, leaves training unchanged."""

from __future__ import annotations

import pytest
from support.runs import SMALL, ZEROS, Trainer, config, same

from prelora_ds.config.deepspeed_section import OFFLOAD_KEYS, ZERO_KEYS
from prelora_ds.engine.fragments import flat_masters
from prelora_ds.engine.restore import check_masters
from prelora_ds.engine.state import export_state

OTHER = {
    "contiguous_gradients": False, "reduce_scatter": False, "reduce_bucket_size": 3000,
    "use_multi_rank_bucket_allreduce": False, "allgather_partitions": False, "allgather_bucket_size": 3000,
    "overlap_comm": True, "load_from_fp32_weights": False, "sub_group_size": 3000, "round_robin_gradients": True,
    "parameter_alignment": True, "memory_efficient_linear": False, "pipeline_loading_checkpoint": True,
    "override_module_apply": False, "log_trace_cache_warnings": True, "enable_sanity_checks": True,
    "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 1000, "stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 0,
    "stage3_gather_16bit_weights_on_model_save": True, "stage3_use_all_reduce_for_fetch_params": True,
    "stage3_allgather_sequential": True,
}
# DeepSpeed's own linear, which it uses at stage 3 by default, adds the bias after rounding the product to BF16.
ROUNDS_AT_STAGE_3 = ("memory_efficient_linear",)
OTHER_OF_OFFLOAD = {"pin_memory": True, "buffer_count": 2, "cpuadam_cores_perc": 0.5}
OTHER_OF_STAGE = {"overlap_comm": {3: False}}  # the default differs between stages


def test_every_accepted_key_has_another_value_here():
    assert set(OTHER) == set(ZERO_KEYS) - {"stage", "offload_optimizer"}
    assert set(OTHER_OF_OFFLOAD) == set(OFFLOAD_KEYS) - {"device"}


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_no_accepted_key_changes_the_losses_of_three_steps(ranks, zero):
    ranks.run(losses_with_every_key, zero=zero)


@pytest.mark.long
@pytest.mark.parametrize("zero", ["zero2_offload", "zero3_offload"])
def test_no_accepted_key_of_offloading_changes_the_losses_of_three_steps(ranks, zero):
    ranks.run(losses_with_every_offload_key, zero=zero)


def losses_with_every_key(zero):
    stage = ZEROS[zero]["stage"]
    expected = three_steps(zero, {})
    for key, value in OTHER.items():
        if key.startswith("stage3_") and stage != 3:
            continue
        value = OTHER_OF_STAGE.get(key, {}).get(stage, value)
        losses = three_steps(zero, {key: value})
        if key in ROUNDS_AT_STAGE_3 and stage == 3:
            assert losses == pytest.approx(expected, rel=2e-3), key
        else:
            assert losses == expected, key


def losses_with_every_offload_key(zero):
    expected = three_steps(zero, {})
    for key, value in OTHER_OF_OFFLOAD.items():
        offload = {"offload_optimizer": {"device": "cpu", key: value}}
        assert three_steps(zero, offload) == expected, key


def three_steps(zero, keys):
    """Return the losses of three steps of two micro-batches each, with a clipped gradient norm."""
    t = Trainer(config(zero, model={**SMALL, "num_hidden_layers": 1}, micro=2,
                       deepspeed={"zero_optimization": {**ZEROS[zero], **keys}}, optimizer={"clip_grad_norm": 0.5}))
    losses = t.train(3)
    t.close()
    return losses


@pytest.mark.parametrize("zero", ["zero1", "zero2"])
def test_masters_survive_switches_where_deepspeed_reorders_parameters(ranks, zero):
    ranks.run(switches_in_another_order, zero=zero)


def switches_in_another_order(zero):
    """The order in memory is round robin, unlike that of the module; state is carried by name."""
    runs = []
    for keys in ({}, {"round_robin_gradients": True}, {"parameter_alignment": True}):
        t = Trainer(config(zero, deepspeed={"zero_optimization": {**ZEROS[zero], **keys}}))
        losses = t.train(2)
        for plan in (t.warmup, t.lora):
            t.switch(plan)
            losses += t.train(2)
        runs.append((losses, t.whole_state()))
        t.close()
    for losses, state in runs[1:]:
        assert losses == runs[0][0] and same(state, runs[0][1]) == []


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_a_displaced_master_is_detected_on_every_rank(ranks, zero):
    ranks.run(displaced_master, zero=zero)


def displaced_master(zero):
    t = Trainer(config(zero))
    check_masters(t.engine.ds)
    if t.rank == 1:
        flat = max(flat_masters(t.engine.ds), key=lambda f: f.numel()).detach().view(-1)
        flat.copy_(flat.roll(1))
    with pytest.raises(RuntimeError, match=r"\[0, [1-9]\d*\] elements of the weights, by rank, differ from their fp32"):
        check_masters(t.engine.ds)
    t.close()


MISFITS = {
    "a smaller rank": "has 1,024 elements in the state but 512 in the plan",
    "a larger rank": "has 1,024 elements in the state but 2,048 in the plan",
    "a missing parameter": "is missing",
    "a foreign parameter": "is not a parameter of the plan",
    "another Adam step on one rank": "the ranks hold different Adam steps",
    "no moments on one rank": "do not match its Adam step",
    "another buffer": "holds the buffers",
}


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_state_that_does_not_fit_is_refused_on_every_rank_alike(ranks, zero, misfit):
    said = ranks.run(refused_state, zero=zero, misfit=misfit)
    assert MISFITS[misfit] in said[0] and said[0] == said[1]


def refused_state(zero, misfit):
    """Return the error; only rank 1's part of the state is changed if one part is enough."""
    from dataclasses import replace

    import torch

    from prelora_ds.core.adapters import AdapterSpec
    from prelora_ds.engine.build import build_engine
    from prelora_ds.engine.release import release

    t = Trainer(config(zero))
    t.switch(t.warmup)
    t.train(1)
    plan, state = t.warmup, export_state(t.engine.ds)
    release(t.engine)
    name = "classifier.weight"
    last = t.rank == 1
    if misfit in ("a smaller rank", "a larger rank"):
        module = next(module for module, spec in plan.adapters.items() if spec.rank == 16)
        plan = replace(plan, adapters={**plan.adapters, module: AdapterSpec(
            "lora", 8 if misfit == "a smaller rank" else 32, 1.0, 0)})
    elif misfit == "a missing parameter":
        state.slices.pop(name, None)
    elif misfit == "a foreign parameter" and last:
        state.slices["foreign"] = next(iter(state.slices.values()))
    elif misfit == "another Adam step on one rank" and last:
        state.adam_steps[name] += 1
    elif misfit == "no moments on one rank" and last:
        next(s for s in state.slices.values() if s.moments).moments.clear()
    elif misfit == "another buffer" and last:
        state.buffers["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="the state does not fit the plan of phase warmup") as refused:
        build_engine(t.cfg, plan, t.layout, t.engine.num_labels, state)
    return str(refused.value)


@pytest.mark.parametrize("zero", ZEROS)
def test_moments_of_step_zero_are_carried(ranks, zero):
    ranks.run(carry_moments_of_step_zero, zero=zero)


def carry_moments_of_step_zero(zero):
    """Such a state follows a restart that resets the steps, or DynaLoRA adapters that never trained."""
    t = Trainer(config(zero))
    t.train(2)

    def back_to_zero(state, plan):
        state.adam_steps.update(dict.fromkeys(state.adam_steps, 0))

    before = t.whole_state()
    from prelora_ds.engine.transition import transition

    t.engine, _ = transition(t.engine, t.full, keep_frozen=back_to_zero)
    after = t.whole_state()
    assert same({k: v for k, v in before.items() if k[1] != "step"},
                {k: v for k, v in after.items() if k[1] != "step"}) == []
    assert {v for (_, what), v in after.items() if what == "step"} == {0}
    t.train(1)
    assert {v for (_, what), v in t.whole_state().items() if what == "step"} == {1}
    t.close()
