"""DynaLoRA from the recipe to the exported model: importance, choices, and what an inactive adapter costs and keeps."""

from __future__ import annotations

import signal

import pytest
import torch
from support.launches import Job, differences, traces
from support.runs import SMALL, Trainer, config

from prelora_ds.engine.importance import measure_importance, take_importance
from prelora_ds.model.adapters.lora import lora_linears
from prelora_ds.run.log import read_lines

NONE = ("convergence=null", "lora.r_min=8", "lora.r_max=64", "lora.warmup=10 epochs")
SETTINGS = (*NONE, "observe.every=2 steps", "train.duration=14 steps", "checkpoint.every=1 steps",
            "checkpoint.keep_last=30", "train.eval_every=7 steps")
FULL = "{name: full, until: 2 steps}"


def phases(active: str) -> str:
    return f"phases=[{FULL}, {{name: dyna, adapters: {{rank: 4}}, train: [adapters, rest]{active}}}]"


TOP = ", active: {choose: top_k, share: 0.5, every: 3 steps}"


@pytest.fixture(scope="module")
def whole(forge, shards, tmp_path_factory):
    """An uninterrupted run that chooses half of its 12 adapters after steps 2, 5, 8 and 11."""
    out = tmp_path_factory.mktemp("dynalora") / "whole"
    job = Job(forge, out, shards, *SETTINGS, phases(TOP))
    assert job.end() == [0, 0], job.said()[-3000:]
    return out


def test_choices_are_logged(whole):
    rows = [row for row in read_lines(whole / "events.jsonl") if row["event"] == "active"]
    assert {row["step"] for row in rows} <= {5, 8, 11} and rows
    assert all(len(row["adapters"]) == 6 for row in rows)


def test_the_run_measures_the_bytes_that_were_predicted(whole):
    (measured,) = [row for row in read_lines(whole / "events.jsonl") if row["event"] == "bytes"]
    assert measured["phase"] == "dyna" and measured["worst_deviation"] < 0.02


@pytest.mark.parametrize("step", [4, 6, 9])
def test_a_run_that_was_killed_equals_the_one_that_was_not(whole, forge, shards, tmp_path, step):
    out = tmp_path / "out"
    killed = Job(forge, out, shards, *SETTINGS, phases(TOP), faults={1: {"place": "step", "call": step, "delay": 0}})
    assert killed.end()[1] == -signal.SIGKILL, killed.said()[-3000:]
    again = Job(forge, out, shards, *SETTINGS, phases(TOP))
    assert again.end() == [0, 0], again.said()[-3000:]
    assert differences(traces(whole), traces(out)) == []


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
    measure_importance(t.engine.module, on=True)
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
    assert all(value == 0.0 for value in take_importance(t.engine.module).values()), "each step begins at 0"
    t.close()
    return found


def test_a_recomputed_forward_pass_is_not_counted_again(ranks):
    ranks.run(recomputed)


def recomputed():
    found = []
    for checkpointing in (False, True):
        t = Trainer(config("zero2", model={**SMALL, "activation_checkpointing": checkpointing}), begin="lora")
        measure_importance(t.engine.module, on=True)
        t.engine.backward(t.batches())
        found.append(t.engine.finish_step(lr=1e-3).importance)
        t.close()
    assert found[0] == pytest.approx(found[1], rel=1e-6)
