"""Singular values of the weights: measured, logged, and decided by."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.launches import Job, differences, kill_and_resume, traces
from support.runs import LABELS, Trainer, config, same

from prelora_ds.core.adapters import Lora
from prelora_ds.core.rank_rules.stable_rank import StableRanks
from prelora_ds.engine.measure import gathered
from prelora_ds.engine.spectra import (
    SpectrumMeter,
    first_values,
    shares_held,
    squared_singular_values,
    stable_rank,
)
from prelora_ds.engine.state import initial_state
from prelora_ds.model.adapters import lora
from prelora_ds.model.families import named_parameters
from prelora_ds.model.vit import build_model
from prelora_ds.reporting.replay import Settings, read_logged, replayed
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import read_lines

# ---- of a matrix

ROUNDING = 1e-5  # spectra have 6 digits


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 7), (7, 1)])
def test_squared_singular_values_are_those_of_a_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(matrix.double()) ** 2
    found = squared_singular_values(matrix)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12 * float(expected[0]))
    norms = [torch.linalg.matrix_norm(matrix.double(), order) ** 2 for order in ("fro", 2)]
    assert stable_rank(found) == pytest.approx(float(norms[0] / norms[1]))


def test_a_matrix_of_low_rank_holds_everything_in_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(20, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
    held = shares_held(squared_singular_values(matrix))
    assert len(held) == 4 and held[1] < 0.999 and held[2:] == pytest.approx([1.0, 1.0])
    orthogonal, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    squared = squared_singular_values(orthogonal)
    assert stable_rank(squared) == pytest.approx(6) and shares_held(squared) == pytest.approx([1 / 6, 2 / 6, 4 / 6])


def test_matrices_without_a_spectrum() -> None:
    zeros = squared_singular_values(torch.zeros(3, 5))
    assert stable_rank(zeros) == 0 and shares_held(zeros) == []
    for bad in (math.nan, math.inf):
        squared = squared_singular_values(torch.tensor([[1.0, bad], [0.0, 1.0]]))
        assert math.isnan(stable_rank(squared)) and all(map(math.isnan, shares_held(squared)))


# ---- of an engine

def meter_of(cfg, t, seed=0):
    torch.manual_seed(seed)
    module = build_model(cfg.model, LABELS)
    first = {name: p.detach().clone() for name, p in named_parameters(module).items()}
    return first, SpectrumMeter(first_values(initial_state(module, t.rank, t.world), t.layout))


def expected_weights(t):
    """Path -> W + s B A in float64: of masters, and of the BF16 value of a frozen weight."""
    state, shapes = t.whole_state(), t.engine.plan.parameters(t.layout)
    found = {}
    for path in t.layout.modules():
        name = f"{path}.weight"
        if (name, "master") in state:
            weight = state[name, "master"].view(shapes[name]).double()
        else:
            with gathered(t.engine, [named_parameters(t.engine.module)[name]]) as (value,):
                weight = value.double().clone()
        if path in t.engine.plan.adapters:
            leaves = {leaf: state[f"{path}.{leaf}", "master"].view(shapes[f"{path}.{leaf}"]).double()
                      for leaf in (Lora.A, Lora.B)}
            weight = weight + lora.product(leaves, t.engine.plan.adapters[path], tuple(weight.shape), slice(None))
        found[path] = weight
    return found


def check(t, meter, first):
    weights, spectra = expected_weights(t), meter.measure(t.engine)
    for family, layers in t.layout.targets.items():
        for layer, path in layers.items():
            squared = torch.linalg.svdvals(weights[path]) ** 2
            start = first[f"{path}.weight"].double()
            squared_first = torch.linalg.svdvals(start) ** 2
            squared_change = torch.linalg.svdvals(weights[path] - start) ** 2
            held = squared_change.cumsum(0) / squared_change.sum()
            found = spectra[family][layer]
            assert found.stable_rank == pytest.approx(float(squared.sum() / squared[0]), rel=ROUNDING)
            assert found.first_stable_rank == pytest.approx(float(squared_first.sum() / squared_first[0]), rel=ROUNDING)
            powers = [1 << exponent for exponent in range((len(held) - 1).bit_length())]
            assert found.change == pytest.approx([float(held[rank - 1]) for rank in powers], rel=10 * ROUNDING)
            assert [found.held(rank) for rank in (*powers, 2 * powers[-1])] == [*found.change, 1.0]
    return spectra


@pytest.mark.parametrize("zero", ["zero0", "zero3", *(pytest.param(zero, marks=pytest.mark.long) for zero in (
    "zero1", "zero2", "zero2_offload", "zero3_offload"))])
def test_spectra_are_those_of_the_effective_weights(ranks, zero):
    one, two = ranks.run(measured_in_each_phase, zero=zero)
    assert one == two


def measured_in_each_phase(zero):
    cfg = config(zero)
    t = Trainer(cfg)
    first, meter = meter_of(cfg, t)
    before = t.snapshot()
    start = meter.measure(t.engine)
    assert same(before, t.snapshot()) == []
    assert all(each.change == () and each.stable_rank == each.first_stable_rank
               for layers in start.values() for each in layers.values())
    found = []
    for plan in (None, t.warmup, t.lora):
        if plan is not None:
            t.switch(plan)
        t.train(2)
        found.append(check(t, meter, first))
    t.close()
    return found


@pytest.mark.long
def test_spectra_of_the_same_weights_are_the_same_at_every_stage_and_world_size(pools):
    found = [pools(world).run(measured_at_start, zero=zero)[0]
             for world, zero in ((1, "zero2"), (2, "zero0"), (2, "zero3"))]
    assert found[0] == found[1] == found[2]


def measured_at_start(zero):
    """Compared with other first values than those of the engine, so that there is a change."""
    cfg = config(zero, micro=8 if zero == "zero2" else 4)
    t = Trainer(cfg)
    found = meter_of(cfg, t, seed=1)[1].measure(t.engine)
    t.close()
    return found


# ---- from the recipe to the exported model

NONE = ("convergence=null", "lora.r_min=8", "lora.r_max=64", "lora.warmup=10 epochs")
SETTINGS = (*NONE, "observe.every=1 step", "observe.spectra=true", "train.duration=14 steps",
            "checkpoint.every=1 steps", "checkpoint.keep_last=30", "train.eval_every=7 steps")
METHOD = ("phases=[{name: full, until: {test: prelora, tau: 90.0, zeta: 90.0, k: 2, m: 2}}, "
          "{name: warmup, adapters: {ranks: {rule: energy, share: 0.6, r_min: 0, r_max: 8, settled: 0.35}}, "
          "until: 4 steps}, {name: lora, train: [adapters, rest]}]")


@pytest.fixture(scope="module")
def whole(forge, shards, tmp_path_factory):
    """An uninterrupted run in which some layers get no adapter."""
    out = tmp_path_factory.mktemp("spectra") / "whole"
    job = Job(forge, out, shards, *SETTINGS, METHOD)
    assert job.end() == [0, 0], job.said()[-3000:]
    return out


def test_a_layer_without_an_adapter_stays_frozen_where_the_others_do(whole: Path) -> None:
    plans = [row["plan"] for row in read_lines(whole / "events.jsonl") if row["event"] == "plan"]
    assert [plan["phase"] for plan in plans] == ["full", "warmup", "lora"]
    _, warmup, lora_phase = plans
    bare = set(warmup["unadapted"])
    assert 0 < len(bare) < 12 and len(bare) + len(warmup["adapters"]) == 12
    assert lora_phase["unadapted"] == warmup["unadapted"] and "unadapted" not in plans[0]
    assert {spec["rank"] for spec in warmup["adapters"].values()} <= {1, 2, 4, 8}
    for path in (*bare, *warmup["adapters"]):
        assert f"{path}.weight" in warmup["trainable"] and f"{path}.weight" not in lora_phase["trainable"]
        assert f"{path}.bias" not in lora_phase["trainable"]


def test_the_ranks_follow_from_the_log(whole: Path) -> None:
    logged = read_logged(RunFolder(whole))
    last = logged.observations[3].spectra
    warmup = next(row["plan"] for row in read_lines(whole / "events.jsonl") if row.get("phase") == "warmup")
    for family, layers in logged.setup.layout.targets.items():
        for layer, path in layers.items():
            if path in warmup["adapters"]:
                rank = warmup["adapters"][path]["rank"]
                held = last[family][layer].held
                assert held(rank) >= 0.6 - 1e-6 or rank == 8
                assert rank == 1 or held(rank // 2) < 0.6
    rows = {row["step"]: row for row in read_lines(whole / "metrics.jsonl")}
    assert rows[4]["stable_rank/q.01"] == last["q"][1].stable_rank


def test_the_log_tells_what_another_test_and_another_rule_would_have_decided(whole: Path) -> None:
    logged = read_logged(RunFolder(whole))
    settings = Settings("stable_rank", {"tau": [50.0], "k": [2], "m": [1]}, ranks=StableRanks(r_min=1, r_max=8))
    warmup = replayed(logged, settings)["decisions"][0]
    assert (warmup["step"], warmup["phase"]) == (2, "warmup")
    assert "all stable ranks changed by at most" in warmup["reason"]
    for family, layers in logged.observations[1].spectra.items():
        assert warmup["ranks"][family] == {
            layer: min(math.ceil(8 * seen.stable_rank / seen.first_stable_rank), 8) for layer, seen in layers.items()}


def test_the_exported_model_has_the_frozen_values_of_a_layer_without_an_adapter(whole: Path) -> None:
    """They are those at the start of the LoRA phase, in which they do not train."""
    from prelora_ds.run.checkpoints.resume import read_checkpoint

    bare = next(row["plan"]["unadapted"] for row in read_lines(whole / "events.jsonl") if row.get("phase") == "warmup")
    layout = read_logged(RunFolder(whole)).setup.layout
    state = read_checkpoint(whole / "checkpoints/step-00000008", layout, 0, 1).engine
    exported = load_file(whole / "model/model.safetensors")
    for path in layout.modules():
        value = state.slices[f"{path}.weight"].value.view(layout.parameters[f"{path}.weight"])
        stayed = any(torch.equal(tensor.bfloat16(), value.bfloat16()) for tensor in exported.values()
                     if tensor.shape == value.shape)  # the exported names are those of another version of transformers
        assert stayed == (path in bare), path


@pytest.mark.parametrize("step", [10, pytest.param(5, marks=pytest.mark.long)])
def test_a_run_that_was_killed_equals_the_one_that_was_not(whole, forge, shards, tmp_path, step):
    out = tmp_path / "out"
    kill_and_resume(partial(Job, forge, out, shards, *SETTINGS, METHOD), step)
    assert differences(traces(whole), traces(out)) == []


@pytest.mark.long
def test_observing_spectra_changes_nothing_else(whole, forge, shards, tmp_path):
    """A run by Algorithm 2, with and without them."""
    method = METHOD.replace("{rule: energy, share: 0.6, r_min: 0, r_max: 8, settled: 0.35}",
                            "{rule: prelora, r_min: 1, r_max: 8}")
    outs = [tmp_path / "with", tmp_path / "without"]
    for out in outs:
        job = Job(forge, out, shards, *SETTINGS, f"observe.spectra={str(out is outs[0]).lower()}", method)
        assert job.end() == [0, 0], job.said()[-3000:]
    rich, plain = map(traces, outs)
    for part in ("metrics", "windows", "observations"):
        rich[part] = [{key: value for key, value in row.items() if key != "spectra" and "stable_rank/" not in key}
                      for row in rich[part]]
        assert not any("spectra" in row for row in plain[part])
    assert differences(rich, plain) == []


@pytest.mark.long
@pytest.mark.parametrize("how", ["resize", "merge"])
def test_a_layer_without_an_adapter_gets_one_in_a_later_phase(forge, shards, tmp_path, how):
    out = tmp_path / "out"
    low, again = "{name: low, ", f"{{name: again, adapters: {{from: {how}, rank: 4}}, train: [adapters, rest]}}]"
    method = METHOD.replace("{name: warmup, ", low).replace("until: 4 steps", "train: [adapters, rest], until: 4 steps")
    method = method.replace("{name: lora, train: [adapters, rest]}]", again)
    job = Job(forge, out, shards, *SETTINGS, method)
    assert job.end() == [0, 0], job.said()[-3000:]
    _, before, after = [row["plan"] for row in read_lines(out / "events.jsonl") if row["event"] == "plan"]
    assert len(before["adapters"]) + len(before["unadapted"]) == 12 and before["unadapted"]
    assert len(after["adapters"]) == 12 and "unadapted" not in after
