"""Quantised weights below adapters (QLoRA): on real engines, and from the recipe to the exported model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import engine_of
from support.engines import check_bytes, check_export, full_values
from support.launches import Job, differences, kill_and_resume, traces
from support.runs import MEDIUM, ZEROS, Trainer, config, micro_batches, same

from prelora_ds.engine.fp32_base import on_fp32_base
from prelora_ds.engine.measure import check_ranks_agree, relative_change
from prelora_ds.engine.release import release
from prelora_ds.engine.state import copy_state, gather_full
from prelora_ds.exporting.convert import export_checkpoint
from prelora_ds.model.adapters import quantised_linears
from prelora_ds.model.quantised import QUANTISERS
from prelora_ds.run.log import read_lines

QUICK = ("nf4", "zero2")
AT_STAGES = pytest.mark.parametrize(("dtype", "zero"), [QUICK, *(
    pytest.param(dtype, zero, marks=pytest.mark.long) for dtype in QUANTISERS for zero in ZEROS
    if (dtype, zero) != QUICK)])
LIMIT = {"int8": 0.02, "nf4": 0.2}  # of the change of the outputs of a model that has taken four steps


# ---- on engines

def codes(t):
    """Name of a quantised weight -> copies of its parts."""
    return {name: [part.clone() for part in linear.quantised.parts()]
            for name, linear in quantised_linears(t.engine.module).items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


@AT_STAGES
def test_a_base_is_quantised_trained_on_and_given_back(ranks, dtype, zero):
    ranks.run(walk, dtype=dtype, zero=zero)


def walk(dtype, zero):
    t = Trainer(config(zero))
    t.train(2)
    t.switch(t.warmup)
    t.train(2)
    masters = {name: value for (name, what), value in t.whole_state().items() if what == "master"}
    before = t.outputs()
    qlora = replace(t.lora, base_dtype=dtype)
    t.switch(qlora)

    # the codes are those of the fp32 masters, on every rank
    shapes = t.layout.parameters
    expected = {name: QUANTISERS[dtype](masters[name].view(shapes[name])).parts() for name in qlora.quantised()}
    assert len(expected) == 18
    first_codes = codes(t)
    assert_equal(first_codes, expected)
    moved = relative_change(before, t.outputs())
    assert 0 < moved < LIMIT[dtype], moved
    with on_fp32_base(t.engine):
        assert relative_change(before, t.outputs()) < 2e-3  # other operations on the same BF16 weights
    assert relative_change(before, t.outputs()) == moved

    # training moves all that trains, and nothing else
    first = t.whole_state()
    losses = []
    for _ in range(6):  # over the same batch
        losses.append(t.engine.train_step(micro_batches(t.cfg, 0, t.rank, t.world), lr=5e-3).loss)
    assert losses[-1] < losses[0], losses
    state = t.whole_state()
    assert {name for name, what in state if what == "master"} == qlora.trainable
    assert all(not torch.equal(first[name, "master"], state[name, "master"]) for name in qlora.trainable)
    assert_equal(codes(t), first_codes)

    # another engine of the same plan continues with the same bits
    outputs = t.outputs()
    t.switch(replace(qlora, since_step=9))
    check_ranks_agree(t.engine)
    assert torch.equal(outputs, t.outputs()) and same(state, t.whole_state()) == []
    assert_equal(codes(t), first_codes)
    check_values(t)
    check_export(t)

    # a phase that trains the weights again begins at their fp32 values
    t.switch(replace(qlora, phase="warmup", base_dtype="bf16", trainable=t.warmup.trainable, since_step=12))
    thawed = t.whole_state()
    assert all(torch.equal(thawed[name, "master"], masters[name]) for name in expected)
    assert t.engine.parked == {}
    t.train(1)
    t.close()


def check_values(t):
    """The values of quantised weights are those that the codes stand for."""
    values = full_values(t)
    for name, linear in quantised_linears(t.engine.module).items():
        assert torch.equal(values[name], linear.quantised.dense(torch.float32))


@AT_STAGES
def test_the_bytes_are_as_predicted(ranks, dtype, zero):
    ranks.run(bytes_as_predicted, dtype=dtype, zero=zero)


def bytes_as_predicted(dtype, zero):
    t = Trainer(config(zero, model=MEDIUM))
    check_bytes(t, replace(t.lora, base_dtype=dtype))
    t.close()


# ---- from the recipe to the exported model

NONE = ("convergence=null", "lora.r_min=8", "lora.r_max=64", "lora.warmup=10 epochs")
SETTINGS = (*NONE, "observe.every=2 steps", "train.duration=10 steps", "checkpoint.every=1 steps",
            "checkpoint.keep_last=30", "train.eval_every=5 steps")


def method(dtype):
    return ("phases=[{name: full, until: 2 steps}, {name: joint, adapters: {rank: 4}, until: 2 steps}, "
            f"{{name: qlora, train: [adapters, rest], base: {{dtype: {dtype}, max_output_change: 0.0001}}}}]")


def start(forge, shards, out, dtype, zero, **options):
    micro = ["train.micro_batch_size=32"] if zero == 0 else []  # stage 0 does not accumulate
    return Job(forge, out, shards, *SETTINGS, method(dtype), *micro, zero=zero, **options)


@pytest.fixture(scope="module")
def wholes(forge, shards, tmp_path_factory):
    """Uninterrupted runs by type and ZeRO stage, each made when it is first needed."""
    @cache
    def whole(dtype, zero):
        out = tmp_path_factory.mktemp("qlora") / "whole"
        job = start(forge, shards, out, dtype, zero)
        assert job.end() == [0, 0], job.said()[-3000:]
        assert "more than phases.qlora.base.max_output_change = 0.01%" in job.said()
        return out

    return whole


def events(out, kind):
    return [row for row in read_lines(out / "events.jsonl") if row["event"] == kind]


def test_the_change_of_the_outputs_and_both_accuracies_are_logged(wholes):
    out = wholes("nf4", 2)
    (base,) = events(out, "base")
    assert {key: base[key] for key in ("step", "phase", "dtype", "before", "max_output_change")} == {
        "step": 4, "phase": "qlora", "dtype": "nf4", "before": "bf16", "max_output_change": 0.0001}
    assert 0 < base["output_change"] < 0.2
    (accuracy,) = events(out, "accuracy")
    last = [row for row in read_lines(out / "metrics.jsonl") if "val/acc1" in row][-1]
    assert accuracy["dtype"] == "nf4" and accuracy["step"] == last["step"] == 10
    assert accuracy["quantised"]["correct"] / accuracy["quantised"]["samples"] == last["val/acc1"]
    assert accuracy["fp32"]["samples"] == accuracy["quantised"]["samples"]
    assert accuracy["fp32"]["loss"] != accuracy["quantised"]["loss"]
    (measured,) = [row for row in events(out, "bytes") if row["phase"] == "qlora"]
    assert measured["worst_deviation"] < 0.02 and measured["predicted"]["host"] > 0


def test_an_export_has_what_training_saw_or_the_fp32_weights(wholes, tmp_path):
    out = wholes("nf4", 2)
    export_checkpoint(out, tmp_path / "seen", "hf")
    export_checkpoint(out, tmp_path / "fp32", "hf", "fp32")
    final, seen, fp32 = (load_file(folder / "model.safetensors")
                         for folder in (out / "model", tmp_path / "seen", tmp_path / "fp32"))
    assert all(torch.equal(final[name], seen[name]) for name in final)
    different = {name for name in seen if not torch.equal(seen[name], fp32[name])}
    assert len(different) == 2 * 6 * 2  # the weights of the adapted linears, and their biases, which are in BF16
    for name in different:
        low, high = (0.03, 0.1) if fp32[name].dim() == 2 else (0, 2**-8)
        assert low < (seen[name] - fp32[name]).norm() / fp32[name].norm() < high
    assert "the nf4 values that the adapters were trained on" in (tmp_path / "seen/README.md").read_text()
    assert "were not evaluated" in (tmp_path / "fp32/README.md").read_text()


@pytest.mark.parametrize(("dtype", "zero", "step"), [("nf4", 2, 7), *(
    pytest.param(dtype, zero, step, marks=pytest.mark.long) for dtype in QUANTISERS for zero in (0, 1, 2, 3)
    for step in (5, 7) if (dtype, zero, step) != ("nf4", 2, 7))])
def test_a_run_that_was_killed_equals_the_one_that_was_not(wholes, forge, shards, tmp_path, dtype, zero, step):
    """Kill it right after the switch (5) or later (7)."""
    out = tmp_path / "out"
    kill_and_resume(partial(start, forge, shards, out, dtype, zero), step)
    assert differences(traces(wholes(dtype, zero)), traces(out)) == []
    assert events(out, "base") == events(wholes(dtype, zero), "base")


def test_one_rank_restores_what_two_have_saved(wholes, pools):
    checkpoint = wholes("nf4", 2) / "checkpoints/step-00000007"
    one, two = (pools(world).run(restored, folder=checkpoint)[0] for world in (1, 2))
    assert one == two and len(one) > 60


def restored(folder):
    """A digest of each weight, moment and quantised part."""
    checkpoint, engine = engine_of(folder)
    plan = checkpoint.run.phase.plan
    state = copy_state(engine.ds, parked=engine.parked)
    digests = {}
    for name, shape in plan.parameters(engine.layout).items():
        for key in ("value", *(("exp_avg", "exp_avg_sq") if name in state.adam_steps else ())):
            full = gather_full(state, name, key, shape, torch.device("cpu"))
            digests[name, key] = full.numpy().tobytes()
    for name, linear in quantised_linears(engine.module).items():
        for i, part in enumerate(linear.quantised.parts()):
            digests[name, i] = part.cpu().numpy().tobytes()
    release(engine)
    return digests | state.adam_steps
