"""What an engine measures and applies per adapter: the importance of its gradients, and its own learning rate."""

from __future__ import annotations

import math

import pytest
from support.runs import ZEROS, Trainer, config, same

ALL = pytest.mark.parametrize("zero", ZEROS)
CLIP = {"clip_grad_norm": 0.05}  # far below every gradient norm here


def trainer(zero):
    """Return a trainer in the LoRA phase whose steps have two micro-batches if the stage accumulates."""
    return Trainer(config(zero, chooses=True, optimizer=CLIP, micro=4 if zero == "zero0" else 2), begin="lora")


def leaves(plan, paths):
    """Return the parameters of the adapters of ``paths``."""
    return {name for name in plan.trainable if name.partition(".lora_")[0] in paths}


# ---- importance of gradients

@ALL
def test_the_norms_of_the_gradients_add_up_to_that_of_the_step(ranks, zero):
    ranks.run(norms, zero=zero)


def norms(zero):
    """Also after half of the adapters stopped training, whose old gradients DeepSpeed may still hold."""
    t = trainer(zero)
    t.engine.measure("backward")
    adapters = set(t.lora.adapters)
    upper = adapters - set(sorted(adapters)[::2])
    for active in (adapters, upper, upper):
        t.engine.set_active(leaves(t.lora, active))
        stats = t.engine.train_step(t.batches(), lr=1e-3)
        t.step += 1
        assert {path for path, value in stats.importance.items() if value > 0} == active
        together = math.sqrt(sum(value**2 for value in stats.importance.values()))
        assert together == pytest.approx(stats.grad_norm, rel=1e-4) and together > 10 * CLIP["clip_grad_norm"]
    t.close()


def test_the_norms_of_the_gradients_do_not_depend_on_the_number_of_ranks(pools):
    one, two = (pools(world).run(measured)[0] for world in (1, 2))
    assert one.keys() == two.keys() and two == pytest.approx(one, rel=0.02), "gradients are BF16"


def measured():
    t = Trainer(config("zero2", micro=4, batch=16), begin="lora")
    t.engine.measure("backward")
    found = t.engine.train_step(t.batches(), lr=1e-3).importance
    t.close()
    return found


# ---- learning rates

@ALL
def test_each_adapter_can_have_its_own_learning_rate(ranks, zero):
    ranks.run(rates, zero=zero)


def rates(zero):
    """Each parameter moves as in a step in which everything has its rate."""
    states = {}
    for case in ("slow", "fast", "mixed"):
        t = trainer(zero)
        fast = set(sorted(t.lora.adapters)[::2])
        own = dict.fromkeys(fast, 3e-3) if case == "mixed" else {}
        t.engine.backward(t.batches())
        t.engine.finish_step(lr=3e-3 if case == "fast" else 1e-3, adapter_lr=own)
        states[case] = t.snapshot()
        t.close()
    names = leaves(t.lora, fast)
    expected = {key: states["fast" if key[0] in names else "slow"][key] for key in states["slow"]}
    assert same(states["mixed"], expected) == []
    differ = {name for name, _ in same(states["slow"], states["fast"])}
    assert differ & names and differ - names, "on each rank"
