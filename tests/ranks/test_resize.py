"""Adapters that get other ranks while they train: the outputs stay, and so does what did not change."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from support.launches import Job, differences, kill_and_resume, traces
from support.runs import ZEROS, Trainer, config, same

from prelora_ds.core.adapters import AdapterSpec, Lora
from prelora_ds.engine.optimizer import inner_optimizer
from prelora_ds.engine.resize import resize_adapters
from prelora_ds.engine.transition import transition
from prelora_ds.model.adapters import lora
from prelora_ds.run.log import read_lines

ALL = pytest.mark.parametrize("zero", ZEROS)


# ---- on engines

def effective(t, state):
    """Path of a linear -> W + s B A, from the fp32 values, in float64."""
    shapes, found = t.engine.plan.parameters(t.layout), {}
    weights = t.parked_weights()
    for path, spec in t.engine.plan.adapters.items():
        leaves = {leaf: state[f"{path}.{leaf}", "master"].view(shapes[f"{path}.{leaf}"]).double()
                  for leaf in (Lora.A, Lora.B)}
        weight = weights[f"{path}.weight"].double()
        found[path] = weight + lora.product(leaves, spec, tuple(weight.shape), slice(None))
    return found


@ALL
def test_adapters_grow_and_shrink_without_a_change_of_the_effective_weights(ranks, zero):
    ranks.run(both_ways, zero=zero)


def both_ways(zero):
    """The adapters of the first layer grow, those of the second shrink, and those of the third stay as they are."""
    t = Trainer(config(zero, lora={"mode": "branch"}))
    t.train(1)
    parked = frozenset(f"{path}.weight" for path in t.lora.adapters)
    t.engine, _ = transition(t.engine, t.lora, parked=parked)
    t.train(3)
    factor = {"0": 2.0, "1": 0.5, "2": 1.0}
    adapters = {path: replace(spec, rank=int(spec.rank * factor[path.split("layers.")[1][0]]))
                for path, spec in t.lora.adapters.items()}
    resized = replace(t.lora, adapters=adapters)

    before, steps = t.whole_state(), dict(inner_optimizer(t.engine.ds).steps)
    weights, outputs = effective(t, before), t.outputs()
    t.engine, _ = transition(t.engine, resized, edit=partial(resize_adapters, layout=t.layout), parked=parked)
    after = t.whole_state()
    for path, weight in effective(t, after).items():
        exact = 0.0 if "layers.1" not in path else 2e-7 * weight.abs().max()
        assert (weight - weights[path]).abs().max() <= exact
    change = (t.outputs() - outputs).square().mean().sqrt() / outputs.square().mean().sqrt()
    assert change < 0.02, "BF16 rounding of the weights and of the adapters"

    third = {key: value for key, value in before.items() if "layers.2" in key[0] or ".layers." not in key[0]}
    assert len(third) > 40 and same(third, {key: after[key] for key in third}) == []
    for name, (path, _) in resized.leaves(t.layout).items():
        old, new = (state[name, "master"] for state in (before, after))
        grown, layer = "layers.0" in path, path.split("layers.")[1][0]
        step = inner_optimizer(t.engine.ds).steps[name]
        assert step == (steps[name] if layer == "2" else 0)
        if layer == "2":
            continue
        assert new.numel() == old.numel() * factor[layer]
        moments = after[name, "exp_avg"]
        kept = moments.count_nonzero()
        assert kept == (before[name, "exp_avg"].count_nonzero() if grown else 0)
        if grown:
            shape, old_shape = (plan.parameters(t.layout)[name] for plan in (resized, t.lora))
            corner = tuple(slice(n) for n in old_shape)
            assert torch.equal(new.view(shape)[corner], old.view(old_shape))
    assert all(loss < 10 for loss in t.train(2))
    t.close()


def test_a_weight_of_which_only_a_rounded_value_exists_is_an_error_on_every_rank(ranks):
    for said in ranks.run(without_fp32):
        assert "has no fp32 value" in said


def without_fp32():
    from prelora_ds.engine.state import copy_state

    t = Trainer(config("zero2", lora={"mode": "branch"}), begin="lora")
    smaller = {path: replace(spec, rank=4) for path, spec in t.lora.adapters.items()}
    try:
        with pytest.raises(RuntimeError) as caught:
            resize_adapters(copy_state(t.engine.ds), t.lora, replace(t.lora, adapters=smaller), layout=t.layout)
    finally:
        t.close()
    return str(caught.value)


@pytest.mark.parametrize(("out", "inputs", "rank"), [(40, 30, 16), (30, 40, 16), (12, 40, 16)])
def test_what_an_adapter_keeps_is_the_nearest_of_its_rank(out, inputs, rank):
    """Compared with the decomposition of the whole product."""
    generator = torch.Generator().manual_seed(0)
    values = {Lora.A: torch.randn(rank, inputs, dtype=torch.float64, generator=generator),
              Lora.B: torch.randn(out, rank, dtype=torch.float64, generator=generator)}
    product = values[Lora.B] @ values[Lora.A]
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    kept = lora.shrunk(values, AdapterSpec("lora", 5, 1.0, 0))
    assert (kept[Lora.A].shape, kept[Lora.B].shape) == ((5, inputs), (out, 5))
    assert torch.allclose(kept[Lora.B] @ kept[Lora.A], u[:, :5] * s[:5] @ v[:5], atol=1e-10)
    assert kept[Lora.A].norm().item() == pytest.approx(kept[Lora.B].norm().item())


# ---- from the recipe to the exported model

NONE = ("convergence=null", "lora.r_min=8", "lora.r_max=64", "lora.warmup=10 epochs")
SETTINGS = (*NONE, "observe.every=1 step", "train.duration=18 steps", "checkpoint.every=1 steps",
            "checkpoint.keep_last=30", "train.eval_every=6 steps")
METHOD = ("phases=[{name: full, until: {test: prelora, tau: 90.0, zeta: 90.0, k: 2, m: 2}}, "
          "{name: lora, adapters: {rank: 4}, train: [adapters, rest], until: 3 steps}, "
          "{name: again, adapters: {from: resize, ranks: {rule: prelora, r_min: 2, r_max: 8, every: 4 steps}}, "
          "train: [adapters, rest]}]")


@pytest.fixture(scope="module")
def whole(forge, shards, tmp_path_factory):
    """An uninterrupted run whose ranks are chosen after steps 7, 11 and 15."""
    out = tmp_path_factory.mktemp("resize") / "whole"
    job = Job(forge, out, shards, *SETTINGS, METHOD)
    assert job.end() == [0, 0], job.said()[-3000:]
    return out


def test_ranks_change_in_the_middle_of_a_run(whole):
    plans = [row for row in read_lines(whole / "events.jsonl") if row["event"] == "plan"]
    assert [row["step"] for row in plans[:3]] == [0, 4, 7]
    assert {row["step"] for row in plans[3:]} <= {11, 15} and plans[3:]
    assert all(row["plan"]["since_step"] == 7 and row["phase"] == "again" for row in plans[2:])
    ranks = [{spec["rank"] for spec in row["plan"]["adapters"].values()} for row in plans]
    assert ranks[1] == {4} and all(some <= {2, 4, 8} and len(some) > 1 for some in ranks[2:])


@pytest.mark.parametrize("step", [9, 13])
def test_a_run_that_was_killed_equals_the_one_that_was_not(whole, forge, shards, tmp_path, step):
    out = tmp_path / "out"
    kill_and_resume(partial(Job, forge, out, shards, *SETTINGS, METHOD), step)
    assert differences(traces(whole), traces(out)) == []
