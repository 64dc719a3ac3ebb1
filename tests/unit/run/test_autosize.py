"""`auto` in phases: the largest micro-batch that fits, the fastest stage, and errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plans import full_plan, lora_plan, warmup_plan

from prelora_ds.config.adapters import FAMILIES
from prelora_ds.config.load import validate
from prelora_ds.config.model import ModelConfig
from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.cost.candidates import USABLE, predict_candidate, predict_candidates
from prelora_ds.cost.timing import KINDS
from prelora_ds.errors import ConfigError
from prelora_ds.hosts.discovery import Ranks
from prelora_ds.model.families import find_layout
from prelora_ds.model.vit import build_model
from prelora_ds.run.autosize import resolve_auto

MODEL = {"image_size": 64, "patch_size": 8, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
         "intermediate_size": 512}
FIRST = Ranks(rank=0, local_rank=0, world_size=4)


@pytest.fixture(scope="module")
def layout() -> Layout:
    with torch.device("meta"):
        return find_layout(build_model(ModelConfig(**MODEL), 10), FAMILIES)


def config(phases: dict[str, Any], zero: dict[str, Any] | None = None, **sections: Any) -> Config:
    machine = {key: phases[key] for key in ("memory_gib", "calibration") if key in phases}
    phases = {name: phase for name, phase in phases.items() if name not in machine}
    return validate({
        "machine": machine, "run": {"name": "auto", "output_dir": "-"}, "model": MODEL,
        "data": {"train": "-", "val": "-"},
        "train": {"duration": "9 steps", "global_batch_size": 64, "micro_batch_size": 2},
        "convergence": {"tau": 1, "zeta": 1}, "deepspeed": {"zero_optimization": zero or {"stage": 3}},
        "phases": phases, **sections}, "test")


def calibration(folder: Path, *, overlaps: bool = False, **seconds: float) -> str:
    path = folder / "calibration.json"
    path.write_text(json.dumps({"rates": {"seconds": dict.fromkeys(KINDS, 0.0) | seconds, "source": "a test",
                                          "measured": True, "overlaps": overlaps}, "memory_gib": 1.0}))
    return str(path)


def test_without_auto_the_config_stays(layout: Layout) -> None:
    cfg = config({"lora": {"zero_stage": 1, "micro_batch_size": 4}})
    assert resolve_auto(cfg, layout, FIRST) is cfg


def test_with_enough_memory_a_rank_uses_one_micro_batch_at_stage_0(layout: Layout) -> None:
    cfg = config({"lora": {"zero_stage": "auto", "micro_batch_size": "auto"}, "memory_gib": 64})
    lora = resolve_auto(cfg, layout, FIRST).for_phase("lora")
    assert (lora.zero.stage, lora.train.micro_batch_size, lora.grad_accum_steps(4)) == (0, 16, 1)
    assert lora.train.global_batch_size == 64
    resolved = resolve_auto(cfg, layout, FIRST).for_phase("full")
    assert (resolved.train, resolved.deepspeed) == (cfg.train, cfg.deepspeed)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_micro_batch_is_the_largest_that_fits(layout: Layout, stage: int) -> None:
    warmup = warmup_plan(layout, {f: dict.fromkeys(layers, 64) for f, layers in layout.targets.items()})
    lora = lora_plan(layout, warmup)
    base = config({"lora": {"zero_stage": stage}}).for_phase("lora")
    peaks = {micro: predict_candidate(base, lora, layout, base.zero, 4, micro).peak_bytes for micro in (1, 2, 4, 8, 16)}
    assert sorted(peaks.values()) == list(peaks.values())
    for micro, peak in peaks.items():
        phases = {"lora": {"zero_stage": stage, "micro_batch_size": "auto"}}
        room = peak / 2**30 / USABLE
        resolved = resolve_auto(config(phases | {"memory_gib": room * (1 + 1e-9)}), layout, FIRST).for_phase("lora")
        largest = max(other for other in peaks if peaks[other] <= peak)  # buckets may need more than one more image
        assert (resolved.train.micro_batch_size, resolved.zero.stage) == (largest, stage)
        if micro == 1:
            with pytest.raises(ConfigError, match="no setting fits"):
                resolve_auto(config(phases | {"memory_gib": room * (1 - 1e-6)}), layout, FIRST)


def test_the_stage_with_the_lowest_predicted_time_is_chosen(layout: Layout, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    phases = {"lora": {"zero_stage": "auto"}, "warmup": {"zero_stage": "auto"}, "memory_gib": 64}
    rates = calibration(tmp_path, wire_gb=1.0, state_gb=1e-3)
    slow_wire = resolve_auto(config(phases | {"calibration": rates}), layout, FIRST)
    assert slow_wire.for_phase("lora").zero.stage == 1  # stage 0 would have to accumulate
    assert slow_wire.for_phase("warmup").zero.stage == 1
    said = capsys.readouterr().out
    assert "auto: warmup: ZeRO 1, micro-batch 2" in said and "auto: lora: ZeRO 1" in said and "a test" in said
    resolve_auto(config(phases), layout, Ranks(1, 1, 4))
    assert capsys.readouterr().out == ""  # one message, not one per rank


def test_a_phase_that_needs_no_offload_has_none_and_one_that_does_keeps_it(layout: Layout, tmp_path: Path) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    phases = {"lora": {"zero_stage": "auto"}, "calibration": calibration(tmp_path, host_gb=9.0, state_gb=1.0)}
    roomy = resolve_auto(config(phases | {"memory_gib": 64}, zero), layout, FIRST).for_phase("lora")
    assert not roomy.zero.offload_optimizer and "offload_optimizer" not in roomy.deepspeed["zero_optimization"]
    base = config(phases, zero).for_phase("lora")
    warmup = warmup_plan(layout, {f: dict.fromkeys(layers, 64) for f, layers in layout.targets.items()})
    lora = lora_plan(layout, warmup)
    stages = [config({}, {**zero, "stage": stage}).zero for stage in (2, 3)]
    tight = min(predict_candidate(base, lora, layout, stage, 4, 2).peak_bytes for stage in stages)
    offloaded = resolve_auto(config(phases | {"memory_gib": tight * 1.0001 / 2**30 / USABLE}, zero), layout, FIRST)
    assert offloaded.for_phase("lora").zero.offload_optimizer


def test_micro_batches_are_even_if_pairs_are_mixed(layout: Layout) -> None:
    cfg = config({"lora": {"micro_batch_size": "auto"}, "memory_gib": 64},
                 train={"duration": "9 steps", "global_batch_size": 24, "micro_batch_size": 2},
                 data={"train": "-", "val": "-", "mixup": 0.2})
    candidates = predict_candidates(cfg.for_phase("full"), full_plan(layout), layout, cfg.zero, 2)
    assert [candidate.micro_batch_size for candidate in candidates] == [2, 4, 6, 12]


def test_merged_weights_are_never_split(layout: Layout) -> None:
    cfg = config({"lora": {"zero_stage": "auto"}, "memory_gib": 64}, lora={"mode": "merged"})
    assert resolve_auto(cfg, layout, FIRST).for_phase("lora").zero.stage != 3


A100 = "NVIDIA A100-SXM4-40GB"


def on_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let this process see a GPU of this name."""
    monkeypatch.setattr("prelora_ds.run.autosize.accelerator_name", lambda: name)
    monkeypatch.setattr("prelora_ds.run.autosize.gpu_total_gib", lambda: 39.4)


def test_on_a_gpu_the_kernel_is_the_one_with_the_lower_modelled_time(
        layout: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config({"memory_gib": 30}, {"stage": 2})
    assert cfg.for_phase("lora").kernel() == "merged" and resolve_auto(cfg, layout, FIRST) is cfg
    on_gpu(monkeypatch, A100)
    resolved = resolve_auto(cfg, layout, FIRST)
    said = re.search(r"auto: lora.mode: (\w+) \((\S+) ms per step with branch, (\S+) ms per step with merged in phase "
                     r"lora, modelled: data sheet of A100-40, not measured", capsys.readouterr().out)
    assert said is not None
    branch, merged = float(said[2]), float(said[3])
    assert said[1] == resolved.lora.mode == ("merged" if merged < branch else "branch")


def test_on_a_gpu_a_calibration_decides_about_the_kernel(
        layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu(monkeypatch, A100)
    for mode, costs in (("merged", {"adapter_tflop": 1.0}), ("branch", {"state_gb": 1.0})):
        rates = calibration(tmp_path, overlaps=True, **costs)
        assert resolve_auto(config({"memory_gib": 30, "calibration": rates}, {"stage": 2}), layout,
                            FIRST).lora.mode == mode
        assert "measured rates: a test" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="was measured on a CPU, but this run computes on a GPU"):
        resolve_auto(config({"calibration": calibration(tmp_path)}, {"stage": 2}), layout, FIRST)


@pytest.mark.parametrize(("zero", "name", "memory_gib", "why"), [
    ({"stage": 2}, "NVIDIA GeForce GTX 1080", 30, "no figures for this GPU"),
    ({"stage": 3}, A100, 30, "cannot run at stage 3"),
])
def test_on_a_gpu_the_kernel_is_branch_without_a_choice(
        layout: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], zero: dict[str, Any],
        name: str, memory_gib: float, why: str) -> None:
    on_gpu(monkeypatch, name)
    assert resolve_auto(config({"memory_gib": memory_gib}, zero), layout, FIRST).lora.mode == "branch"
    assert why in capsys.readouterr().out
    chosen = config({"memory_gib": memory_gib}, zero, lora={"mode": "peft"})
    assert resolve_auto(chosen, layout, FIRST) is chosen


def test_a_list_of_phases_gets_the_kernel_where_its_adapters_begin(layout: Layout, monkeypatch: pytest.MonkeyPatch
                                                                   ) -> None:
    on_gpu(monkeypatch, "an unknown GPU")
    phases = [{"name": "full", "until": "3 steps"},
              {"name": "warm", "adapters": {"rank": 4}, "until": "3 steps"},
              {"name": "lora", "train": ["adapters", "rest"]}]
    cfg = validate({**config({"memory_gib": 30}, {"stage": 2}).model_dump(mode="json"), "phases": phases,
                    "convergence": None, "lora": None}, "test")
    resolved = resolve_auto(cfg, layout, FIRST)
    assert [resolved.for_phase(name).adapters.mode for name in ("warm", "lora")] == ["branch", "branch"]


def test_on_a_gpu_stage_0_pays_for_each_of_its_tensors(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, A100)
    cfg = config({"lora": {"zero_stage": "auto", "micro_batch_size": "auto"}, "memory_gib": 30})
    assert resolve_auto(cfg, layout, FIRST).for_phase("lora").zero.stage == 2


@pytest.mark.parametrize(("phases", "sections", "key"), [
    ({"lora": {"zero_stage": "auto"}, "calibration": "none.json"}, {}, "machine.calibration"),
    ({"lora": {"micro_batch_size": "auto"}, "memory_gib": 1e-3}, {}, "phases.lora"),
    ({"lora": {"micro_batch_size": "auto"}},
     {"model": {"factory": "a:b", "families": {"q": r"(?P<layer>\d+)"}}, "lora": {"families": ["q"]}}, "phases"),
])
def test_an_unresolvable_auto_names_its_key(layout: Layout, phases: dict[str, Any], sections: dict[str, Any],
                                              key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_auto(config(phases, **sections), layout, FIRST)
    assert str(refused.value).startswith(f"{key} =")


@pytest.mark.parametrize("own", [{"zero_stage": 4}, {"zero_stage": "largest"}, {"micro_batch_size": 0},
                                 {"micro_batch_size": "all"}])
def test_other_words_than_auto_are_refused(own: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"phases.lora.{next(iter(own))}"):
        config({"lora": own})


def test_a_stage_that_cannot_offload_is_refused_if_the_run_offloads() -> None:
    with pytest.raises(ConfigError, match=r"phases.lora.*offload_optimizer"):
        config({"lora": {"zero_stage": 1}}, {"stage": 2, "offload_optimizer": {"device": "cpu"}})
