"""DynaLoRA from the recipe to the exported model: importance, choices, and what an inactive adapter costs and keeps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from deepspeed import comm
from support.checkpoints import engine_of, method_of
from support.launches import Job, differences, kill_and_resume, traces
from support.runs import SMALL, Trainer, config, micro_batches

from prelora_ds.core.adapters import Lora
from prelora_ds.core.allocators import NAMES, THRESHOLD
from prelora_ds.core.controller import PhaseController
from prelora_ds.core.schedule import Timeline
from prelora_ds.core.selection import active_adapters
from prelora_ds.engine.release import release
from prelora_ds.model.adapters.lora import lora_linears
from prelora_ds.run.checkpoints.resume import read_checkpoint
from prelora_ds.run.log import read_lines

NONE = ("convergence=null", "lora.r_min=8", "lora.r_max=64", "lora.warmup=10 epochs")
SETTINGS = (*NONE, "observe.every=2 steps", "train.duration=14 steps", "checkpoint.every=1 steps",
            "checkpoint.keep_last=30", "train.eval_every=7 steps")
FULL = "{name: full, until: 2 steps}"


def phases(active: str) -> str:
    return f"phases=[{FULL}, {{name: dyna, adapters: {{rank: 4}}, train: [adapters, rest]{active}}}]"


CUT = ", active: {choose: discounted, k: 3, every: 3 steps, cut_backward: true}"
SEED = "run.seed=20"  # its first choice in phase dyna leaves the lowest block alone, and a later one does not


def start(forge, shards, out, zero, **options):
    micro = ["train.micro_batch_size=32"] if zero == 0 else []  # stage 0 does not accumulate
    return Job(forge, out, shards, *SETTINGS, phases(CUT), SEED, *micro, zero=zero, **options)


@pytest.fixture(scope="module")
def wholes(forge, shards, tmp_path_factory):
    """Uninterrupted runs by ZeRO stage, each made when it is first needed.

    They choose 3 of their 12 adapters after steps 2, 5, 8 and 11.
    """
    @cache
    def whole(zero):
        out = tmp_path_factory.mktemp("dynalora") / "whole"
        job = start(forge, shards, out, zero)
        assert job.end() == [0, 0], job.said()[-3000:]
        return out

    return whole


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_choices_are_followed_without_a_rebuild_and_all_else_stays_bitwise(wholes, zero):
    out = wholes(zero)
    events = read_lines(out / "events.jsonl")
    assert [row["phase"] for row in events if row["event"] == "plan"] == ["full", "dyna"]
    rows = [row for row in events if row["event"] == "active"]
    assert [sum(row["updates"].values()) for row in rows] == [3 * (row["step"] - 2) for row in rows]
    chosen = {row["step"]: row["adapters"] for row in rows}
    assert {2} < chosen.keys() <= {2, 5, 8, 11} and len(chosen) > 2
    assert all(len(adapters) == 3 for adapters in chosen.values())

    _, layout = method_of(out)
    folders = [out / f"checkpoints/step-{step:08d}" for step in range(3, 15)]
    checkpoints = [read_checkpoint(folder, layout, 0, 1) for folder in folders]
    lowest = set()
    for before, after in pairwise(checkpoints):
        plan = before.run.phase.plan
        lowest.add(layer_below_which_nothing_trains(plan, layout))
        for name, part in before.engine.slices.items():
            then, trains = after.engine.slices[name], name in plan.training()
            still = torch.equal(part.value, then.value) and all(
                torch.equal(part.moments[key], then.moments[key]) for key in part.moments)
            assert trains or still, name
            assert not (trains and still) or name.endswith(Lora.A), name  # A has no gradient while B is zero
            steps = (c.engine.adam_steps.get(name) for c in (before, after))
            assert next(steps) == next(steps) - 1 if trains else next(steps) == next(steps), name
    assert lowest == {0, 1}, "the run has both kinds of choices"


def test_the_run_measures_the_bytes_that_were_predicted(wholes):
    (measured,) = [row for row in read_lines(wholes(2) / "events.jsonl") if row["event"] == "bytes"]
    assert measured["phase"] == "dyna" and measured["worst_deviation"] < 0.02


def layer_below_which_nothing_trains(plan, layout):
    """Return the lowest layer with a chosen adapter, after a check that nothing before it trains."""
    layers = {path: layer for found in layout.targets.values() for layer, path in found.items()}
    lowest = min(layers[path] for path in active_adapters(plan, layout))
    assert not plan.training() & layout.before(lowest)
    return lowest


@pytest.mark.parametrize(("zero", "step"), [
    (1, 9), (3, 6), *(pytest.param(*more, marks=pytest.mark.long) for more in [(0, 6), (2, 4), (2, 9), (3, 12)])])
def test_a_run_that_was_killed_equals_the_one_that_was_not(wholes, forge, shards, tmp_path, zero, step):
    out = tmp_path / "out"
    kill_and_resume(partial(start, forge, shards, out, zero), step)
    assert differences(traces(wholes(zero)), traces(out)) == []


def test_one_two_and_four_ranks_choose_the_same_adapters(wholes, pools):
    """The importance of the last step before a choice differs only by the order of summation."""
    checkpoint = wholes(2) / "checkpoints/step-00000004"
    by_world = [pools(world).run(choices, folder=checkpoint)[0] for world in (1, 2, 4)]
    assert by_world[0] == by_world[1] == by_world[2]
    assert by_world[0].keys() == set(NAMES) and len(set(map(frozenset, by_world[0].values()))) > 2


def choices(folder):
    """Return what each rule chooses after one more step from a checkpoint."""
    checkpoint, engine = engine_of(folder)
    state, step = checkpoint.run.phase, checkpoint.run.step + 1
    config, layout = engine.run_config, engine.layout
    engine.backward(micro_batches(config, step, comm.get_rank(), comm.get_world_size()))
    importance = engine.finish_step(lr=1e-3).importance
    assert len(importance) == 12 and all(value > 0 for value in importance.values())
    full, dyna = config.specs()
    found = {}
    for name in NAMES:
        share = 0.4 if name == THRESHOLD else None
        selection = replace(dyna.selection, choose=name, k=None if share else 3, share=share)
        controller = PhaseController(
            layout=layout, timeline=Timeline(1437, config.train.global_batch_size, config.train.duration),
            phases=[full, replace(dyna, selection=selection)], seed=config.run.seed)
        after = controller.after_step(state, step, importance=importance)
        assert after.choices == state.choices + 1
        found[name] = sorted(active_adapters(after.plan, layout))
    release(engine)
    return found


def test_a_run_with_all_adapters_active_is_plain_lora(forge, shards, tmp_path):
    runs = []
    for name, active in (("all", ", active: {choose: stochastic, share: 1.0, every: 3 steps}"), ("plain", "")):
        run = Job(forge, tmp_path / name, shards, *SETTINGS, phases(active))
        assert run.end() == [0, 0], run.said()[-3000:]
        runs.append(traces(tmp_path / name))
    assert differences(*runs) == []


def test_importance_is_that_of_the_whole_outputs_at_every_world_size(pools):
    one, two = (pools(world).run(importance)[0] for world in (1, 2))
    assert one.keys() == two.keys() and len(one) == 18
    for path, value in one.items():
        assert value == pytest.approx(two[path], rel=1e-5) and value > 0


def importance():
    """The importance of one step, compared with what hooks see of the outputs."""
    t = Trainer(config("zero2", micro=4, batch=16, lora={"mode": "branch"}), begin="lora")
    t.engine.measure("forward")
    seen = {}
    names = {id(m): path for path, m in t.engine.module.named_modules()}

    def see(module, _, output):
        path = names[id(module)]
        norms = output.detach().float().flatten(1).norm(dim=1).double()
        seen[path] = seen.get(path, 0.0) + float(norms.sum())

    hooks = [linear.register_forward_hook(see) for linear in lora_linears(t.engine.module)]
    t.engine.backward(t.batches())
    for hook in hooks:
        hook.remove()
    found = t.engine.finish_step(lr=1e-3).importance
    total = torch.tensor(list(seen.values()), dtype=torch.float64)
    torch.distributed.all_reduce(total)
    assert list(found.values()) == pytest.approx(total.tolist(), rel=1e-5)
    t.step += 1
    t.engine.backward(t.batches())
    assert t.engine.finish_step(lr=0.0).importance == pytest.approx(found, rel=0.2), "each step begins at 0"
    t.close()
    return found


def test_a_recomputed_forward_pass_is_not_counted_again(ranks):
    ranks.run(recomputed)


def recomputed():
    found = []
    for checkpointing in (False, True):
        t = Trainer(config("zero2", model={**SMALL, "activation_checkpointing": checkpointing}), begin="lora")
        t.engine.measure("forward")
        t.engine.backward(t.batches())
        found.append(t.engine.finish_step(lr=1e-3).importance)
        t.close()
    assert found[0] == pytest.approx(found[1], rel=1e-6)


GRADIENTS = ", active: {choose: stochastic, share: 0.5, every: 3 steps, importance: backward, optimizer: local}"
CONVERGED = ("phases=[{name: full, until: {test: prelora, tau: 90.0, zeta: 90.0, k: 2, m: 1}}, {name: dyna, "
             "adapters: {rank: 4}, train: [adapters, rest], active: {choose: unconverged, tau: 0.2, every: 2 steps, "
             "cut_backward: true}}]")


@pytest.mark.parametrize("method", [phases(GRADIENTS), CONVERGED], ids=["gradients, own rates", "unconverged"])
def test_other_choices_resume_bitwise_too(forge, shards, tmp_path, method):
    jobs = []
    for name, faults in (("whole", {}), ("killed", {1: {"place": "step", "call": 10, "delay": 0}}), ("killed", {})):
        job = Job(forge, tmp_path / name, shards, *SETTINGS, method, faults=faults)
        assert (job.end() == [0, 0]) == (not faults), job.said()[-3000:]
        jobs.append(job)
    assert "resuming after step" in jobs[-1].said()
    assert differences(traces(tmp_path / "whole"), traces(tmp_path / "killed")) == []
    rows = [row for row in read_lines(tmp_path / "whole/events.jsonl") if row["event"] == "active"]
    if method == CONVERGED:
        sizes = [len(row["adapters"]) for row in rows]
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 12, sizes
    else:
        measured = [row["step"] for row in rows if len(row["adapters"]) == 12]
        assert measured == [4, 7, 10], "before the choices after steps 5, 8 and 11"
