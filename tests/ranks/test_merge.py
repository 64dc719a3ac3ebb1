"""ReLoRA's merge on real engines: what it writes, with which bits, and what must stay as it is."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.runs import ZEROS, Trainer, config, same

from prelora_ds.core.merge import Reset
from prelora_ds.engine.build import build_engine
from prelora_ds.engine.measure import check_ranks_agree
from prelora_ds.engine.merge import fold_adapters, merge_adapters, reset_mask
from prelora_ds.engine.optimizer import MOMENTS, inner_optimizer
from prelora_ds.engine.restore import check_masters
from prelora_ds.engine.state import export_state
from prelora_ds.engine.transition import transition
from prelora_ds.model.adapters import initial_adapter_value

ALL = pytest.mark.parametrize("zero", ZEROS)
RULES = {"zero": Reset(), "magnitude": Reset("magnitude", 0.75), "random": Reset("random", 0.3)}


def relora(zero: str, *, full_steps: int = 1, **settings: object) -> Trainer:
    """A run after three steps in the LoRA phase, whose frozen weights are parked."""
    t = Trainer(config(zero, lora={"mode": "branch"}, **settings))
    t.train(full_steps)
    t.engine, _ = transition(t.engine, t.lora, parked=adapted(t))
    t.train(3)
    return t


def adapted(t: Trainer) -> frozenset[str]:
    return frozenset(f"{path}.weight" for path in t.lora.adapters)


@ALL
@pytest.mark.parametrize("rule", RULES)
def test_a_live_merge_equals_one_by_a_transition(ranks, zero, rule):
    if rule != "zero" and zero not in ("zero1", "zero3"):
        pytest.skip("the reset of moments is the same code at every stage")
    ranks.run(live_and_by_transition, zero=zero, rule=rule)


def live_and_by_transition(zero, rule):
    reset, runs = RULES[rule], []
    for live in (True, False):
        t = relora(zero)
        following = replace(t.engine.plan, cycle=1)
        if live:
            report = merge_adapters(t.engine, following, reset)
            trained = sum(torch.Size(t.lora.parameters(t.layout)[name]).numel()
                          for name in t.lora.leaves(t.layout))
            assert report.elements == trained
            assert abs(report.reset_share - reset.share) < 1e-3
            assert 0 < report.output_change < 0.05  # the weights are rounded to BF16
        else:
            t.engine, _ = transition(t.engine, following, parked=adapted(t),
                                     edit=partial(restart, layout=t.layout, reset=reset))
        check_masters(t.engine.ds)
        check_ranks_agree(t.engine)
        parked = t.parked_weights()
        losses = t.train(3)
        runs.append((losses, t.whole_state(), parked))
        t.close()
    (losses, state, parked), (losses_2, state_2, parked_2) = runs
    assert all(torch.equal(parked[name], parked_2[name]) for name in parked)
    if not zero.endswith("offload"):  # DeepSpeedCPUAdam keeps running powers of beta, which a new engine lacks
        assert losses == losses_2 and same(state, state_2) == []


def restart(state, before, after, *, layout, reset):
    """The oracle: fold the adapters, and put them back with first values and masked moments."""
    from prelora_ds.engine.state import Slice, gather_full

    cpu = torch.device("cpu")
    shapes, leaves = before.parameters(layout), before.leaves(layout)
    old = {name: (state.slices.get(name), gather_full(state, name, "exp_avg", shapes[name], cpu)) for name in leaves}
    fold_adapters(state, before, after, layout=layout)
    for name, (part, exp_avg) in old.items():
        state.adam_steps[name] = 0
        if part is None:
            continue
        stop = part.start + part.value.numel()
        first = initial_adapter_value(name, shapes[name], after, leaves).view(-1)[part.start: stop]
        seed = after.adapters[leaves[name][0]].seed
        gone = reset_mask(name, shapes[name], seed, after.cycle, reset, exp_avg)[part.start: stop]
        moments = {key: part.moments[key].masked_fill(gone, 0.0) for key in MOMENTS}
        state.slices[name] = Slice(part.start, first.clone(), moments)


@ALL
def test_a_merge_is_rounded_once_moves_nothing_else_and_survives_a_rebuild(ranks, zero):
    ranks.run(rounded_once, zero=zero)


def rounded_once(zero):
    t = relora(zero, full_steps=0)  # so the rest has taken as many Adam steps as the adapters
    rest = {key: value for key, value in t.whole_state().items() if key[0] not in t.lora.leaves(t.layout)}
    before, full = t.parked_weights(), dict(t.whole_state())
    merge_adapters(t.engine, replace(t.engine.plan, cycle=1), RULES["magnitude"])
    for path, spec in t.lora.adapters.items():
        a, b = (full[f"{path}.{leaf}", "master"].double().view(t.lora.parameters(t.layout)[f"{path}.{leaf}"])
                for leaf in ("lora_A.weight", "lora_B.weight"))
        exact = before[f"{path}.weight"].double() + spec.scaling * (b @ a)
        assert torch.equal(t.parked_weights()[f"{path}.weight"], exact.float()), path
    after = t.whole_state()
    assert same(rest, {key: after[key] for key in rest}) == [], "head, norms and biases keep values, moments and steps"
    steps = inner_optimizer(t.engine.ds).steps
    assert {steps[name] for name in t.lora.leaves(t.layout)} == {0}
    assert {steps[name] for name, what in rest if what == "step"} == {3}

    parked = t.parked_weights()
    t.engine, _ = transition(t.engine, t.engine.plan, parked=adapted(t))
    assert same(after, t.whole_state()) == [], "a rebuild carries moments whose Adam step is 0"
    assert all(torch.equal(parked[name], value) for name, value in t.parked_weights().items())
    t.close()


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2"])
def test_the_merged_kernel_takes_the_merge_into_its_fp32_weight(ranks, zero):
    ranks.run(merged_kernel, zero=zero)


def merged_kernel(zero):
    """The same merge as with parked slices, from the same state."""
    found = []
    for mode in ("branch", "merged"):
        t = relora(zero)
        t.cfg = config(zero, lora={"mode": mode})
        state = export_state(t.engine.ds)
        state.slices |= t.engine.parked
        t.engine = build_engine(t.cfg, t.lora, t.layout, t.engine.num_labels, state, parked=adapted(t))
        assert bool(t.engine.parked) == (mode == "branch"), "the kernel merged keeps the weights itself"
        merge_adapters(t.engine, replace(t.lora, cycle=1), Reset())
        exported = export_state(t.engine.ds)
        exported.slices |= t.engine.parked
        digest = hashlib.sha256()
        for name in sorted(adapted(t)):
            digest.update(exported.slices[name].value.float().numpy().tobytes())
        found.append(digest.hexdigest())
    assert found[0] == found[1]


def test_masks_have_exactly_the_share_and_break_ties_by_index():
    shape = (7, 11)
    for share, count in ((0.25, 19), (0.5, 38), (1.0, 77)):
        random = reset_mask("x", shape, 0, 1, Reset("random", share), None)
        assert int(random.sum()) == count
        assert torch.equal(random, reset_mask("x", shape, 0, 1, Reset("random", share), None))
        assert share == 1.0 or not torch.equal(random, reset_mask("x", shape, 0, 2, Reset("random", share), None))
        ties = reset_mask("x", shape, 0, 1, Reset("magnitude", share), torch.ones(shape))
        assert ties.nonzero().flatten().tolist() == list(range(count))
    moments = torch.tensor([[3.0, -1.0], [-4.0, 2.0]])
    assert reset_mask("x", (2, 2), 0, 1, Reset("magnitude", 0.5), moments).tolist() == [False, True, False, True]
    assert reset_mask("x", (2, 2), 0, 1, Reset("zero", 0.5), None).all()


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.75, 1.0])
def test_magnitude_resets_what_a_stable_sort_puts_first(share):
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(50, 40, generator=generator)
    half_zero = torch.where(torch.rand(50, 40, generator=generator) < 0.5, 0.0, moments)
    with_ties = torch.randint(-3, 4, (50, 40), generator=generator).float()
    for exp_avg in (moments, half_zero, with_ties):
        first = exp_avg.abs().view(-1).argsort(stable=True)[: round(share * 2000)]
        mask = reset_mask("x", (50, 40), 0, 1, Reset("magnitude", share), exp_avg)
        assert mask.nonzero().flatten().tolist() == sorted(first.tolist())
