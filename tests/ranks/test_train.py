"""Test the main job with the real launcher.

Covered are three phases, the output folder, the exported model, and every kind of user error.
"""

from __future__ import annotations

import io
import json
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.launch import launch
from support.launches import Job
from support.runs import LABELS, ZEROS, Trainer, config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import ViTForImageClassification

from prelora_ds.config.load import load_config
from prelora_ds.core.codec import from_json, to_json
from prelora_ds.core.controller import PhaseController
from prelora_ds.core.schedule import Timeline
from prelora_ds.core.switch_tests.prelora import Observation, close_window
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.transforms import to_float
from prelora_ds.exporting.hf import export_model
from prelora_ds.reporting.progress import TrainProgress
from prelora_ds.run.context import Run
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import read_lines
from prelora_ds.run.records import Records
from prelora_ds.version import git_commit

ROOT = Path(__file__).parents[2]
DEBUG = "launch/recipes/vit_tiny_debug.yaml"


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    done = launch("--recipe", DEBUG, "--deepspeed_config", "ds_configs/zero2.json", f"run.output_dir={out}",
                  f"data.train={shards / 'train'}", f"data.val={shards / 'val'}",
                  "phases.lora.zero_stage=auto", "phases.lora.micro_batch_size=auto")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, done.stdout


def test_a_run_goes_through_all_phases_because_algorithm_1_passed(finished):
    out, _ = finished
    rows = read_lines(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["phase"] for row in rows] == ["full"] * 8 + ["warmup"] * 4 + ["lora"] * 8
    assert all(row["epoch"] == pytest.approx(row["step"] * 64 / 1437) for row in rows)
    assert all(row["train/loss"] > 0 and row["step_s"] > 0 for row in rows)
    assert [row["step"] for row in rows if "val/acc1" in row] == [10, 20]
    assert [row["step"] for row in rows if "norm/q.00" in row] == list(range(2, 21, 2))
    plans = [e for e in read_lines(out / "events.jsonl") if e["event"] == "plan"]
    assert [p["step"] for p in plans] == [0, 8, 12]
    assert "Algorithm 1 passed at test 1" in plans[1]["reason"]
    assert plans[2]["reason"] == "phase warmup has lasted 4 steps"
    assert plans[2]["trainable_parameters"] < plans[0]["trainable_parameters"] < plans[1]["trainable_parameters"]
    assert {s["rank"] for s in plans[1]["plan"]["adapters"].values()} <= {2, 4}


def test_rows_have_training_accuracy_peaks_and_the_norms_of_base_and_adapter(finished):
    rows = read_lines(finished[0] / "metrics.jsonl")
    assert all(0 <= row["train/acc1"] <= row["train/acc5"] <= 1 for row in rows)
    assert all((row["train/acc5"] * 64) % 1 == 0 for row in rows), "of 64 samples"
    assert all(0.1 < row["peak_gib"] < 10 for row in rows)
    for row in (row for row in rows if "norm/q.00" in row):
        keys = {key.partition("/")[2] for key in row if key.startswith("norm_adapter/")}
        assert keys == {key.partition("/")[2] for key in row if key.startswith("norm_base/")}
        assert bool(keys) == (row["phase"] != "full")
        for key in keys:
            whole, base, adapter = (row[f"{group}/{key}"] for group in ("norm", "norm_base", "norm_adapter"))
            assert adapter > 0 and abs(base - adapter) <= whole * (1 + 1e-5) <= (base + adapter) * (1 + 2e-5)
    frozen = [row["norm_base/q.00"] for row in rows if row["phase"] == "lora" and "norm_base/q.00" in row]
    assert len(set(frozen)) == 1 < len(frozen)


def test_each_job_logs_its_command_commit_versions_and_hosts(finished):
    (job,) = [event for event in read_lines(finished[0] / "events.jsonl") if event["event"] == "job"]
    assert job["step"] == 0
    assert "launch/pretrain.py" in job["command"] and f"run.output_dir={finished[0]}" in job["command"]
    assert job["commit"] == git_commit() and job["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert len(job["hosts"]) == 1 and job["world_size"] == 2


def test_predicted_and_measured_bytes_are_logged_side_by_side(finished):
    out, printed = finished
    measured = [e for e in read_lines(out / "events.jsonl") if e["event"] == "bytes"]
    assert [e["phase"] for e in measured] == ["full", "warmup", "lora"]
    assert all(e["worst_deviation"] < 0.02 for e in measured)
    assert "warning: memory" not in printed


def test_windows_are_disjoint_and_of_m_measurements(finished):
    out, _ = finished
    windows = read_lines(out / "windows.jsonl")
    assert [w["last_step"] for w in windows] == [4, 8, 12, 16, 20]
    assert [w["verdict"] is not None for w in windows] == [False, True, False, False, False]
    losses = {row["step"]: row["train/loss"] for row in read_lines(out / "metrics.jsonl")}
    assert windows[0]["loss"] == pytest.approx(sum(losses[s] for s in (1, 2, 3, 4)) / 4)


def test_each_observation_is_kept_exactly_as_the_controller_saw_it(finished):
    out, _ = finished
    seen = [from_json(Observation, row) for row in read_lines(out / "observations.jsonl")]
    assert [(o.step, o.samples) for o in seen] == [(step, 128) for step in range(2, 21, 2)]
    rows = {row["step"]: row for row in read_lines(out / "metrics.jsonl")}
    for o in seen:
        assert o.loss == (rows[o.step - 1]["train/loss"] + rows[o.step]["train/loss"]) / 2
        for family, layers in o.norms.items():
            assert layers == {i: rows[o.step][f"norm/{family}.{i:02d}"] for i in layers} and len(layers) == 2
    for i, window in enumerate(read_lines(out / "windows.jsonl")):
        closed = to_json(close_window(i, seen[2 * i: 2 * i + 2], "mean"))
        assert closed == {key: window[key] for key in closed}


def test_tensorboard_is_one_run_with_an_unbroken_axis(finished):
    out, _ = finished
    assert len(list((out / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    for tag in ("train/loss", "Train/Samples/lr"):  # ours, and one that DeepSpeed's engines write
        assert [e.step for e in events.Scalars(tag)] == [64 * step for step in range(1, 21)]


def test_the_resolved_config_is_printed_once_and_kept(finished):
    out, printed = finished
    assert printed.count("micro_batch_size: 16") == 1
    kept = load_config(out / "config.yaml")
    assert kept.deepspeed["zero_optimization"] == {"stage": 2} and kept.run.output_dir == str(out)
    # `auto` is resolved before the first step: a rank's full share in one micro-batch, at the stage that
    # moves the fewest bytes.
    assert printed.count("auto: lora: ZeRO 0, micro-batch 32") == 1
    assert (kept.for_phase("lora").zero.stage, kept.for_phase("lora").train.micro_batch_size) == (0, 32)


def test_the_final_table_is_printed(finished):
    _, printed = finished
    for text in ("full", "warmup", "lora", "trainable parameters", "moments, KiB", "validation top-1", "Algorithm 1"):
        assert text in printed, text


def test_the_fp32_base_of_what_froze_is_kept_whole(finished):
    out, _ = finished
    parts, starts = {}, {}
    for path in sorted((out / "checkpoints").glob("base-*/*.safetensors")):
        with safe_open(path, "pt") as file:
            for name, start in json.loads(file.metadata()["starts"]).items():
                parts.setdefault(name, {})[start] = file.get_tensor(f"value/{name}")
            assert len(file.keys()) == len(json.loads(file.metadata()["starts"]))  # no moments
    plan = [e for e in read_lines(out / "events.jsonl") if e["event"] == "plan"]
    assert parts.keys() == set(plan[1]["plan"]["trainable"]) - set(plan[2]["plan"]["trainable"]) != set()
    vit = ViTForImageClassification.from_pretrained(out / "model")
    for name, slices in parts.items():
        whole = torch.cat([slices[start] for start in sorted(slices)])
        assert whole.dtype is torch.float32 and whole.numel() == vit.get_parameter(name).numel()
        starts[name] = sorted(slices)[0]
        if name.endswith(".bias"):  # a frozen, unmerged bias: exported in BF16 precision
            assert torch.equal(whole.bfloat16().float(), vit.get_parameter(name).data)
    assert set(starts.values()) == {0}


def test_a_second_run_in_the_same_folder_is_refused_and_overwrites_nothing(finished, shards):
    out, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = launch("--recipe", DEBUG, "--deepspeed_config", "ds_configs/zero2.json", f"run.output_dir={out}",
                  f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", runner="deepspeed.launcher.launch")
    assert done.returncode == 2 and "holds a finished run" in done.stderr + done.stdout
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


MISTAKES = {
    "no such option": (["--recipes", "x"], "command line", "--recipes"),
    "misspelt zero key": (["--deepspeed_config", "MISSPELT"], "zero_optimization.reduce_bucketsize",
                          "did you mean reduce_bucket_size?"),
    "zero value that DeepSpeed rejects": (["deepspeed.zero_optimization.allgather_bucket_size=-2"],
                                          "zero_optimization.allgather_bucket_size", "DeepSpeed rejects it"),
    "unknown key": (["train.micro_batch=8"], "train.micro_batch", "did you mean train.micro_batch_size?"),
    "missing recipe": (["--recipe", "launch/recipes/nothing.yaml"], "--recipe", "does not exist"),
    "missing data": (["data.train=/nowhere"], "data.train", "/nowhere"),
    "impossible batch": (["train.global_batch_size=50"], "train.micro_batch_size", "50"),
    "tau": (["convergence.tau=0"], "convergence.tau = 0", "greater than 0"),
    "r_min": (["lora.r_min=3"], "lora", "power of two"),
    "unknown family": (["lora.families=[q,kk]"], "lora.families", "kk"),
    "family that matches nothing": (
        ["model.factory=support.models:mlp", "model.families={fc1: 'none_(?P<layer>\\d+)'}", "lora.families=[fc1]"],
        "model.families.fc1", "matches no module"),
    "owned key": (["--deepspeed_config", "OWNED"], "gradient_clipping", "optimizer.clip_grad_norm"),
    "bad override": (["train.duration"], "override", "a.b=c"),
    "impossible batch of a phase": (["phases.lora.micro_batch_size=25"], "phases.lora.micro_batch_size", "25"),
    "owned key of a phase": (["phases.lora.deepspeed={gradient_clipping: 1}"], "phases.lora.deepspeed",
                             "optimizer.clip_grad_norm"),
    "stage 0 accumulates": (["--deepspeed_config", "ds_configs/zero0.json", "train.micro_batch_size=8"],
                            "train.micro_batch_size", "BF16"),
}


@pytest.fixture(scope="module")
def mistaken(forge, shards, tmp_path_factory):
    """Return mistake -> (exit codes, output, output folder)."""
    folder = tmp_path_factory.mktemp("mistakes")
    owned = folder / "owned.json"
    owned.write_text(json.dumps({"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}))

    misspelt = folder / "misspelt.json"
    misspelt.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucketsize": 1}}))
    files = {"OWNED": str(owned), "MISSPELT": str(misspelt)}

    def make(mistake):
        job = Job(forge, folder / mistake, shards, *(files.get(word, word) for word in MISTAKES[mistake][0]))
        return job.end(), job.said(), folder / mistake

    return {mistake: make(mistake) for mistake in MISTAKES}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_with_key_value_and_remedy_and_exit_code_2(mistake, mistaken):
    _, key, problem = MISTAKES[mistake]
    codes, said, out = mistaken[mistake]
    assert 2 in codes and not set(codes) - {2, -signal.SIGKILL}, said
    assert said.count("error: ") == 1 and said.count("remedy: ") == 1, said
    message = said[said.index("error: "): said.index("\n", said.index("remedy: "))]
    assert key in message and problem in message, message
    assert "Traceback" not in said and not out.exists()


def test_a_run_that_diverges_stops_with_step_and_phase_named(forge, shards, tmp_path):
    job = Job(forge, tmp_path / "out", shards, "optimizer.lr=1e30")
    codes, said = job.end(), job.said()
    assert codes[0] == 1 and said.count("error: ") == 1, said
    assert "step 2, phase full: the loss is nan" in said or "step 3, phase full: the loss is nan" in said, said


def test_twenty_times_one_message_and_exit_code_2(forge, shards, tmp_path):
    """Test whichever rank is first, and the launcher with and without its first stage."""
    arguments = ("--recipe", DEBUG, f"run.output_dir={tmp_path / 'out'}", "data.train=/nowhere")
    for done in (launch(*arguments), launch(*arguments, runner="deepspeed.launcher.launch")):
        assert (done.returncode, (done.stderr + done.stdout).count("error: ")) == (2, 1)
    for _ in range(20):
        job = Job(forge, tmp_path / "out", shards, "data.train=/nowhere")
        codes = job.end()
        assert (codes[0], job.said().count("error: ")) == (2, 1), job.said()


@pytest.mark.parametrize("zero", ZEROS)
def test_the_exported_folder_gives_the_engine_s_logits(ranks, zero, tmp_path):
    difference, scale = ranks.run(export_and_compare, zero=zero, folder=str(tmp_path / "model"))[0]
    assert difference <= 2 ** -6 * scale  # BF16 has 8 bits, and the engine rounds after each of a dozen layers


def test_a_deviation_of_more_than_5_percent_is_warned_of(ranks, tmp_path):
    as_predicted, with_more = ranks.run(log_bytes, folder=str(tmp_path))[0]
    assert as_predicted == ""
    assert "warning: memory in phase full differs from the prediction by" in with_more
    assert "predicted {'weights'" in with_more


def log_bytes(folder):
    """Return what rank 0 prints for an engine as it is, and for one with an extra gradient."""
    t, said = Trainer(config("zero2")), []
    manifest, own = Manifest(Path(folder), ("a",), (), 0, np.empty(0), Path(folder)), RunFolder(Path(folder))
    timeline = Timeline(64, 8, t.cfg.train.duration)
    controller = PhaseController(layout=t.layout, timeline=timeline, phases=t.cfg.specs(), seed=0)
    run = Run(t.cfg, t.layout, timeline, controller, manifest, manifest, 0, own, ["here"] * t.world)
    records = Records(run, TrainProgress(100, shown=t.rank == 0), 0)
    t.train(2)
    weight = next(t.engine.module.parameters())
    t.engine.backward(t.batches())
    kept = weight.grad_accum
    for gradient in (kept, torch.zeros(1_000_000)):
        weight.grad_accum = gradient
        with redirect_stdout(io.StringIO()) as printed:
            records.bytes(t.engine, t.step)
        said.append(printed.getvalue())
    weight.grad_accum = kept
    t.engine.finish_step(lr=1e-3)
    records.close_logs()
    t.close()
    return said


def export_and_compare(zero, folder):
    t = Trainer(config(zero))
    t.train(3)
    t.switch(t.warmup)
    t.train(3)
    t.switch(t.lora)
    t.train(5)
    expected = t.outputs()
    images = t.batches_of(10_000)
    export_model(t.engine, Path(folder))
    vit = ViTForImageClassification.from_pretrained(folder).eval()
    assert not any("lora" in name for name in vit.state_dict())
    with torch.no_grad():
        got = vit(to_float(images, torch.float32)).logits
    return float((got - expected).abs().max()), float(expected.abs().max())


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_any_torch_module_goes_through_all_phases(ranks, zero, tmp_path):
    ranks.run(not_a_vit, zero=zero, folder=str(tmp_path / "model"))


def not_a_vit(zero, folder):
    sys.path.insert(0, str(ROOT / "tests")) if str(ROOT / "tests") not in sys.path else None
    from support.models import mlp

    t = Trainer(config(zero, model={
        "factory": "support.models:mlp", "factory_args": {"width": 32, "depth": 3}, "image_size": 8,
        "families": {"up": r"blocks\.(?P<layer>\d+)\.up", "down": r"blocks\.(?P<layer>\d+)\.down"},
    }, lora={"families": ["up", "down"]}))
    assert {f: len(layers) for f, layers in t.layout.targets.items()} == {"up": 3, "down": 3}
    for plan in (t.warmup, t.lora):
        t.train(3)
        before = t.outputs()
        t.switch(plan)
        assert torch.equal(before, t.outputs())
    t.train(3)
    expected, images = t.outputs(), t.batches_of(10_000)
    export_model(t.engine, Path(folder))
    if t.rank == 0:
        model = mlp(num_labels=LABELS, width=32, depth=3)
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        got = model.eval()(to_float(images, torch.float32))
        assert float((got - expected).abs().max()) <= 2 ** -6 * float(expected.abs().max())
