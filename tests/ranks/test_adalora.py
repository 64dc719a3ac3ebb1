"""AdaLoRA's pruning on real engines, compared with the allocator of peft on whole tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from support.kinds import frozen, of_kind
from support.runs import LABELS, ZEROS, Trainer, config, micro_batches, same
from torch import nn

from prelora_ds.core.adapters import AdaLora
from prelora_ds.core.pruning import Cut
from prelora_ds.engine.build import build_engine
from prelora_ds.engine.fragments import adam_state, fragments, gradients
from prelora_ds.engine.optimizer import SENSITIVITY
from prelora_ds.engine.release import release
from prelora_ds.engine.restore import check_masters
from prelora_ds.engine.state import copy_state, even_share, gather_parts
from prelora_ds.model.families import named_parameters
from prelora_ds.run.checkpoints.part import read_state, write_part

BETAS = {"beta1": 0.6, "beta2": 0.7}
LEAVES = ("lora_A", "lora_B", "lora_E")
RATE = 5e-3


def at(*quick):
    return [zero if zero in quick else pytest.param(zero, marks=pytest.mark.long) for zero in ZEROS]


def begin(zero, **options):
    """Return a trainer in a phase that trains AdaLoRA's adapters of rank 8, without clipping."""
    t = Trainer(config(zero, optimizer={"clip_grad_norm": 0.0}))
    plan = of_kind(t.warmup, t.layout, "adalora")
    adapters = {path: replace(spec, options={**BETAS, **options}) for path, spec in plan.adapters.items()}
    t.switch(frozen(replace(plan, adapters=adapters), t.layout))
    return t


def step(t, cut=None, **options):
    t.engine.backward(t.batches())
    stats = t.engine.finish_step(lr=RATE, cut=cut, **options)
    t.step += 1
    return stats


def whole(t, parts):
    """Return name -> whole tensor of fragments with tensors, the same on all ranks. Collective."""
    shapes = t.engine.plan.parameters(t.layout)
    found = {}
    for fragment, tensor in parts:
        start, stop = fragment.start, fragment.stop
        if t.engine.config.zero.stage == 0:
            start, stop = even_share(stop, t.rank, t.world)
        found[fragment.name] = start, tensor.float()[start - fragment.start : stop - fragment.start].cpu()
    return {name: gather_parts(*found.get(name, (0, None)), shapes[name], torch.device("cpu"))
            for name in sorted(t.engine.plan.trainable)}


def masters(t):
    return whole(t, [(fragment, fragment.of(fragment.flat)) for fragment in fragments(t.engine.ds)])


def sensitivities(t, key):
    state = adam_state(t.engine.ds)
    leaves = t.engine.plan.leaves(t.layout)
    return whole(t, [(fragment, fragment.of(state[fragment.flat][key]))
                     for fragment in fragments(t.engine.ds) if fragment.name in leaves])


class Peft:
    """The allocator of peft with copies of the adapters as whole tensors."""

    def __init__(self, t):
        self.paths = {f"p{i:03}": path for i, path in enumerate(t.engine.plan.adapters)}
        shapes = t.engine.plan.parameters(t.layout)
        self.model = nn.ModuleDict({
            key: nn.ModuleDict({leaf: nn.ParameterDict({"default": torch.zeros(shapes[f"{path}.{leaf}"])})
                                for leaf in LEAVES})
            for key, path in self.paths.items()})
        peft = AdaLoraConfig(init_r=8, target_r=4, total_step=100, tinit=1, tfinal=1, **BETAS)
        self.allocator = RankAllocator(self.model, peft, "default")

    def measure(self, values, grads):
        for key, path in self.paths.items():
            for leaf in LEAVES:
                p = self.model[key][leaf]["default"]
                p.data.copy_(values[f"{path}.{leaf}"])
                p.grad = grads[f"{path}.{leaf}"].clone()
        self.allocator.update_ipt(self.model)

    def dropped(self, keep):
        """Return the name of each E -> which of its elements are pruned."""
        for key in self.paths:
            self.model[key]["lora_E"]["default"].data.fill_(1.0)
        self.allocator.mask_to_budget(self.model, keep)
        return {f"{path}.lora_E": self.model[key]["lora_E"]["default"].data == 0 for key, path in self.paths.items()}

    def averages(self, key):
        found = {"sensitivity": self.allocator.exp_avg_ipt, "uncertainty": self.allocator.exp_avg_unc}[key]
        return {f"{path}.{leaf}": found[f"{name}.{leaf}.default"]
                for name, path in self.paths.items() for leaf in LEAVES}


@pytest.mark.parametrize("zero", at("zero0", "zero2", "zero3"))
def test_components_are_pruned_as_by_peft_s_allocator_and_stay_pruned(ranks, tmp_path, zero):
    ranks.run(pruned, zero=zero, folder=tmp_path)


def pruned(zero, folder):
    t = begin(zero)
    peft = Peft(t)
    components = sum(t.engine.plan.pruned().values())
    assert components == 8 * len(t.engine.plan.adapters)
    for keep in (None, components - 5, None, components // 2):
        t.engine.backward(t.batches())
        peft.measure(masters(t), whole(t, gradients(t.engine.ds)))
        stats = t.engine.finish_step(lr=RATE, cut=Cut(keep))
        t.step += 1
        for key in SENSITIVITY:
            ours = sensitivities(t, key)
            for name, expected in peft.averages(key).items():
                torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-12)
        if keep is not None:
            expected = peft.dropped(keep)
            assert sum(int(flags.sum()) for flags in expected.values()) == components - keep
            check_zeros(t, expected)
        remaining = {} if keep is None else {name.removesuffix(".lora_E"): 8 - int(flags.sum())
                                            for name, flags in expected.items()}
        assert stats.remaining == remaining

    saved = copy_state(t.engine.ds)
    write_part(saved, folder / f"rank-{t.rank:05d}-of-{t.world:05d}.safetensors")
    counters, averages = t.engine.counters(), [sensitivities(t, key) for key in SENSITIVITY]
    outcome = finish(t, components)

    # the same again from the files
    release(t.engine)
    torch.distributed.barrier()
    plan = t.engine.plan
    shapes = {name: torch.Size(shape).numel() for name, shape in plan.parameters(t.layout).items()}
    state, _ = read_state([folder], [t.world], shapes, t.rank, t.world)
    state.adam_steps = saved.adam_steps
    t.engine = build_engine(t.cfg, plan, t.layout, LABELS, state, counters)
    t.step -= 5
    again = [sensitivities(t, key) for key in SENSITIVITY]
    assert all(same(a, b) == [] for a, b in zip(averages, again, strict=True))
    assert same(outcome, finish(t, components)) == []
    check_skipped(t)
    t.close()


def finish(t, components):
    """Prune for the last time, and check that nothing but the pruned components moves; return the whole state."""
    step(t, Cut())
    step(t, Cut(keep=components // 3))
    zeros = {name: value == 0 for name, value in masters(t).items() if name.endswith("lora_E")}
    assert sum(int(flags.sum()) for flags in zeros.values()) == components - components // 3
    before = masters(t)
    averages = [sensitivities(t, key) for key in SENSITIVITY]
    for _ in range(3):
        step(t, Cut(final=True))
        check_zeros(t, zeros)
    after = masters(t)
    for name, flags in zeros.items():
        assert (after[name] != before[name])[~flags].all()
    assert all(same(then, sensitivities(t, key)) == [] for then, key in zip(averages, SENSITIVITY, strict=True))
    return t.whole_state()


def check_zeros(t, expected):
    """Check that the masters and the BF16 weights of E are zero where ``expected`` says so, and nowhere else."""
    check_masters(t.engine.ds)
    parameters = named_parameters(t.engine.module)
    values = masters(t)
    for name, flags in expected.items():
        assert torch.equal(values[name] == 0, flags)
        if parameters[name].data.numel() == flags.numel():  # all of it is on this rank
            assert torch.equal(parameters[name].data.cpu() == 0, flags)


def check_skipped(t):
    """Check that a step whose update is skipped measures and prunes nothing."""
    before, averages = masters(t), [sensitivities(t, key) for key in SENSITIVITY]
    assert step(t, Cut(keep=1), accept=lambda loss: False).skipped
    assert same(before, masters(t)) == []
    assert all(same(then, sensitivities(t, key)) == [] for then, key in zip(averages, SENSITIVITY, strict=True))


def test_until_pruning_is_over_a_component_may_come_back(ranks):
    ranks.run(comes_back)


def comes_back():
    t = begin("zero2")
    components = sum(t.engine.plan.pruned().values())
    step(t, Cut())
    step(t, Cut(keep=components // 2))
    step(t, Cut())
    assert all((value != 0).all() for name, value in masters(t).items() if name.endswith("lora_E"))
    t.close()


@pytest.mark.parametrize("zero", at("zero0", "zero3"))
def test_the_regulariser_does_not_depend_on_ranks_or_micro_batches(ranks, zero):
    ranks.run(regularised, zero=zero)


def regularised(zero):
    """While E is zero, its gradient is all that A and B have."""
    accumulates = zero != "zero0"
    t = Trainer(config(zero, micro=2 if accumulates else 4, optimizer={"clip_grad_norm": 0.0}))
    t.switch(frozen(of_kind(t.warmup, t.layout, "adalora"), t.layout))
    t.engine.backward(micro_batches(t.cfg, 0, t.rank, t.world))
    found, values = whole(t, gradients(t.engine.ds)), masters(t)
    leaves = {name: leaf for name, (_, leaf) in t.engine.plan.leaves(t.layout).items() if leaf != AdaLora.E}
    factors = {name: values[name].bfloat16().float().requires_grad_() for name in leaves}
    rows = [factors[name] if leaf == AdaLora.A else factors[name].t() for name, leaf in leaves.items()]
    loss = 0.5 * sum(torch.linalg.matrix_norm(r @ r.t() - torch.eye(len(r))) for r in rows) / len(rows)
    loss.backward()
    for name, factor in factors.items():
        assert factor.grad.norm() > 0
        assert (found[name] - factor.grad).norm() < 0.01 * factor.grad.norm(), name  # it is rounded to BF16
    t.close()
