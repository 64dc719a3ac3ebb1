"""Runs that are killed, stopped, damaged, or resumed on other ranks and stages: nothing is lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from support.launches import Job, differences, traces
from support.zygote import DEAD_PIPE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prelora_ds.reporting.table import phase_rows
from prelora_ds.run.checkpoints.checkpoint_folder import CheckpointManifest, list_checkpoints, step_of
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import read_lines

# Dropout reveals a generator that does not continue where it stopped.
SETTINGS = ("checkpoint.every=3 steps", "checkpoint.keep_last=9", "model.hidden_dropout_prob=0.1")


@pytest.fixture(scope="module")
def job(forge, shards):
    """Start a launch with this module's settings."""
    return lambda out, *arguments, **options: Job(forge, out, shards, *SETTINGS, *arguments, **options)


@pytest.fixture(scope="module")
def reference(job, tmp_path_factory):
    """Return the folder of an uninterrupted run at a ZeRO stage, made at the first request."""
    folder, made = tmp_path_factory.mktemp("reference"), {}

    def of(zero):
        if zero not in made:
            done = job(folder / f"zero{zero}", zero=zero)
            assert done.end() == [0, 0], done.said()[-3000:]
            made[zero] = folder / f"zero{zero}"
        return made[zero]

    return of


@pytest.fixture(scope="module")
def stopped(job, tmp_path_factory):
    """A run that a signal to one rank stopped in the LoRA phase, with checkpoints of all phases."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    ended = job(out, faults={1: {"place": "step", "call": 14, "delay": 0, "signal": int(signal.SIGUSR1)}})
    assert ended.end() == [99, 99], ended.said()[-3000:]
    return out, ended.said()


def copied(stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "out")
    return tmp_path / "out"


# ---- killed

KILLS = {  # place, rank, call, seconds after the call; one after another in the same run
    2: [("write", 1, 2, 0.0), ("switch", 0, 1, 0.2), ("evaluate", 1, 1, 0.01)],
    3: [("step", 0, 5, 0.01), ("commit", 0, 2, 0.0)],
}


@pytest.mark.parametrize("zero", KILLS)
def test_a_killed_run_ends_bitwise_like_an_uninterrupted_one(job, reference, tmp_path, zero):
    out = tmp_path / "out"
    for place, rank, call, delay in KILLS[zero]:
        killed = job(out, zero=zero, faults={rank: {"place": place, "call": call, "delay": delay}})
        assert killed.end()[rank] == -signal.SIGKILL, killed.said()[-3000:]
    last = job(out, zero=zero)
    assert last.end() == [0, 0], last.said()[-3000:]
    assert differences(traces(reference(zero)), traces(out)) == []
    assert [row["step"] for row in read_lines(out / "metrics.jsonl")] == list(range(1, 21))
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [64 * step for step in range(1, 21)]
    assert not list((out / "checkpoints").glob(".*"))


# ---- stopped

def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_and_99(stopped, job, reference, tmp_path):
    out, said = stopped
    assert step_of(list_checkpoints(out / "checkpoints")[0]) == 15 and "stopped after step 15" in said
    assert (out / "checkpoints/latest").read_text() == "step-00000015\n"
    out = copied(stopped, tmp_path)
    last = job(out)
    assert last.end() == [0, 0] and "resuming after step 15" in last.said()
    assert differences(traces(reference(2)), traces(out)) == []
    again = job(out)
    assert again.end()[0] == 2 and "holds a finished run" in again.said()


def test_a_dead_pipe_costs_no_checkpoint(job, tmp_path):
    ended = job(tmp_path / "out", log=DEAD_PIPE,
                faults={0: {"place": "step", "call": 3, "delay": 0, "signal": int(signal.SIGTERM)}})
    assert ended.end() == [99, 99]
    folder = tmp_path / "out/checkpoints/step-00000004"
    CheckpointManifest.load(folder).verify(folder)


def test_a_run_stops_before_its_walltime_is_over(job, tmp_path):
    """Its checkpoint contains DeepSpeed's own folder, too, which DeepSpeed opens."""
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors import safe_open

    ended = job(tmp_path / "out", "checkpoint.walltime=4 s", "train.duration=5000 steps", "checkpoint.every=null",
                "convergence=null", "checkpoint.deepspeed_format=true")
    assert ended.end() == [99, 99], ended.said()[-3000:]
    assert "checkpoint.walltime" in ended.said() or "another rank" in ended.said()
    [folder] = list_checkpoints(tmp_path / "out/checkpoints")
    CheckpointManifest.load(folder).verify(folder)
    weights, seen = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="deepspeed"), 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name, start in json.loads(file.metadata()["starts"]).items():
                mine = file.get_tensor(f"value/{name}")
                assert torch.equal(weights[name].reshape(-1)[start: start + mine.numel()], mine), name
                seen += mine.numel()
    assert seen == sum(w.numel() for w in weights.values()) > 0


def test_a_hung_rank_ends_the_other_one_with_85_and_its_stacks(job, tmp_path):
    hung = job(tmp_path / "out", "guard.hang_limit=6",
               faults={1: {"place": "step", "call": 5, "delay": 0, "signal": int(signal.SIGSTOP)}})
    assert hung.end()[0] == 85
    assert "error (rank 0): no progress for" in hung.said() and "all_reduce" in hung.said()


# ---- on other ranks and stages

@pytest.mark.parametrize(("world", "zero"), [(1, 3), (4, 1)])
def test_a_run_resumes_at_another_world_size_and_stage(stopped, job, reference, tmp_path, world, zero):
    out = copied(stopped, tmp_path)
    before = read_lines(out / "metrics.jsonl")
    moved = job(out, world=world, zero=zero)
    assert moved.end() == [0] * world, moved.said()[-3000:]
    rows, expected = read_lines(out / "metrics.jsonl"), read_lines(reference(2) / "metrics.jsonl")
    assert rows[:15] == before and [r["step"] for r in rows] == [r["step"] for r in expected]
    for row, other in zip(rows, expected, strict=True):
        assert (row["lr"], row["phase"], row["epoch"]) == (other["lr"], other["phase"], other["epoch"])
        assert row["train/loss"] == pytest.approx(other["train/loss"], abs=2e-2)  # dropout masks differ


def test_a_new_run_may_begin_from_a_checkpoint_of_another(stopped, job, tmp_path):
    source = stopped[0] / "checkpoints/step-00000015"
    settings = ("train.duration=18 steps", "optimizer.lr=0.0001")
    killed = job(tmp_path / "new", *settings, resume=str(source), faults={0: {"place": "step", "call": 2, "delay": 0}})
    assert killed.end()[0] == -signal.SIGKILL, killed.said()[-3000:]
    new = job(tmp_path / "new", *settings, resume=str(source))  # the same command; the run has no own checkpoint yet
    assert new.end() == [0, 0], new.said()[-3000:]
    events = read_lines(tmp_path / "new/events.jsonl")
    assert [(row["event"], row["step"]) for row in events] == [
        ("resume", 15), ("plan", 12), ("fork", 15), ("job", 15), ("bytes", 18), ("end", 18)]
    assert [row["measured"] for row in phase_rows(RunFolder(tmp_path / "new"))] == [events[4]["measured"]]
    assert [row["step"] for row in read_lines(tmp_path / "new/metrics.jsonl")] == [16, 17, 18]
    assert step_of(list_checkpoints(stopped[0] / "checkpoints")[0]) == 15
    refused = job(tmp_path / "other", "lora.r_max=8", resume=str(source))
    assert refused.end()[0] == 2 and "phases.warmup.adapters.ranks.r_max = 8: was 4 in" in refused.said()
    assert not (tmp_path / "other/config.yaml").exists()


# ---- damaged

def test_a_broken_checkpoint_is_named_and_skipped_by_all_ranks(stopped, ranks, tmp_path):
    ranks.run(damaged_checkpoints, source=str(stopped[0]), folder=str(tmp_path))


def damaged_checkpoints(source, folder):
    """Truncate, flip and remove each file of the newest checkpoint and of its base in turn."""
    import torch.distributed as dist

    from prelora_ds.config.load import load_config
    from prelora_ds.errors import ConfigError
    from prelora_ds.model.families import find_layout
    from prelora_ds.model.vit import build_model
    from prelora_ds.run.checkpoints.resume import load_newest, resumable_checkpoints

    config = load_config(Path(source) / "config.yaml")
    layout = find_layout(build_model(config.model, 10), config.lora.families)
    out, said = Path(folder) / "out", []
    root = out / "checkpoints"
    if dist.get_rank() == 0:
        shutil.copytree(source, out)
    dist.barrier()
    newest, next_one = list_checkpoints(root)[:2]
    base = root / CheckpointManifest.load(newest).base
    last_without = next(f for f in list_checkpoints(root) if CheckpointManifest.load(f).base is None)
    victims = [(path, next_one) for path in sorted(newest.iterdir())] \
        + [(path, last_without) for path in sorted(base.iterdir())]
    assert len(victims) == 7
    for path, expected in victims:
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1])
                        + whole[len(whole) // 2 + 1:], None):
            dist.barrier()
            if dist.get_rank() == 0:
                path.unlink() if damaged is None else path.write_bytes(damaged)
            dist.barrier()
            found = load_newest(resumable_checkpoints(RunFolder(out), "auto"), RunFolder(out), layout, said.append)
            assert found.folder == expected, (path, said)
            assert f"skipping {newest.name}: " in said[0] and path.parent.name in said[0], said
            said.clear()
            dist.barrier()
            if dist.get_rank() == 0:
                path.write_bytes(whole)
    dist.barrier()
    found = load_newest(resumable_checkpoints(RunFolder(out), "auto"), RunFolder(out), layout, said.append)
    assert found.folder == newest and not said
    dist.barrier()
    if dist.get_rank() == 0:
        for checkpoint in list_checkpoints(root):
            (checkpoint / "state.json").write_text("{}")
    dist.barrier()
    with pytest.raises(ConfigError, match=r"no intact checkpoint found: .*state\.json.*\n  remedy"):
        load_newest(resumable_checkpoints(RunFolder(out), "auto"), RunFolder(out), layout, said.append)


def test_the_rank_that_finds_a_broken_file_reports_it_for_all(stopped, job, tmp_path):
    out = copied(stopped, tmp_path)
    with (out / "checkpoints/step-00000015/rank-00001-of-00002.safetensors").open("r+b") as file:
        file.truncate(100)
    last = job(out)
    assert last.end() == [0, 0], last.said()[-3000:]
    assert "skipping step-00000015: " in last.said() and "resuming after step 12" in last.said()
    assert "rank-00001-of-00002.safetensors: is 100 bytes" in last.said()
    assert (out / "checkpoints/aside/step-00000015").is_dir()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_new_checkpoints_but_neither_the_run_nor_earlier_ones(stopped, job, small_disk, tmp_path):
    out = copied(stopped, tmp_path)
    shutil.copytree(out / "checkpoints", small_disk / "checkpoints")
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").symlink_to(small_disk / "checkpoints")
    before = {path: path.read_bytes() for path in sorted(small_disk.rglob("*")) if path.is_file()}
    with (small_disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
        while True:
            filler.write(bytes(4096))
    ended = job(out, faults={0: {"place": "step", "call": 3, "delay": 0, "signal": int(signal.SIGTERM)}})
    assert ended.end()[0] == 75, ended.said()[-3000:]
    said = ended.said()
    assert "warning: the checkpoint of step 18 could not be written; keeping the one of step 15: rank" in said
    assert "stop requested (SIGTERM) after step 19, but the checkpoint could not be written" in said
    assert "No space left" in said and "Traceback" not in said
    assert before == {path: path.read_bytes() for path in before}
    (small_disk / "filler").unlink()
    assert job(out).end() == [0, 0]


def test_a_new_run_whose_disk_has_no_room_for_the_base_ends_with_75(stopped, job, small_disk):
    """The base is copied from the other run, across file systems, before the first step."""
    out = small_disk / "out"
    with (small_disk / "filler").open("wb") as filler:
        filler.write(bytes(3 * 2**20 - 40 * 1024))  # room for the config and not for the base
    refused = job(out, resume=str(stopped[0]))
    assert 75 in refused.end(), refused.said()[-3000:]
    said = refused.said()
    assert said.count("error") == 1 and "Traceback" not in said, said
    assert "run.output_dir" in said and "No space left" in said
    assert not list((out / "checkpoints").glob("*")), "the partial copy still takes space"
    (small_disk / "filler").unlink()
    assert job(out, resume=str(stopped[0])).end() == [0, 0]


def test_a_read_only_folder_is_reported_before_anything_starts(job, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused = job(small_disk / "out", log=str(small_disk.with_name("log")))
    assert refused.end()[0] == 2 and "cannot be written (Read-only file system)" in refused.said()
    refused = job(small_disk, log=str(small_disk.with_name("log2")))
    assert refused.end()[0] == 2 and "cannot be written (Read-only file system)" in refused.said()


def test_two_jobs_in_one_folder(job, reference, tmp_path):
    out = tmp_path / "out"
    first = job(out)
    first.wait_for(out / "metrics.jsonl")
    second = job(out)
    assert second.end()[0] == 75
    assert f"is in use by process {first.pids[0]} on {os.uname().nodename}" in second.said()
    assert first.end() == [0, 0]
    assert differences(traces(reference(2)), traces(out)) == []


def test_a_run_with_other_settings_is_refused_with_key_and_both_values(stopped, job, tmp_path):
    out = copied(stopped, tmp_path)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    refused = job(out, "optimizer.lr=0.5")
    assert refused.end()[0] == 2 and "optimizer.lr = 0.5: was 0.001 in" in refused.said()
    never = job(out, resume="never")
    assert never.end()[0] == 2 and "holds another run" in never.said()
    assert before == {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# ---- diverged

@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_a_skipped_update_changes_nothing(ranks, zero):
    ranks.run(skip_one_update, zero=zero)


def skip_one_update(zero):
    """Masters, moments and Adam steps stay; then training continues as without that step."""
    import torch
    from support.runs import Trainer, config, micro_batches, same

    def norms():
        return [float(p.detach().float().norm()) for p in t.engine.module.parameters() if not zero.startswith("zero3")]

    t = Trainer(config(zero))
    t.train(2)
    before, norms_before = t.whole_state(), norms()
    # Other images than in the next step: clipping would hide a gradient that is the same twice.
    t.engine.backward(micro_batches(t.cfg, 99, t.rank, t.world))
    stats = t.engine.finish_step(lr=1e-3, accept=lambda loss: False)
    assert stats.skipped and stats.loss > 0
    assert same(before, t.whole_state()) == []
    assert norms() == norms_before
    losses, after = t.train(2), t.whole_state()
    t.close()
    t = Trainer(config(zero))
    t.train(2)
    assert losses == t.train(2) and torch.isfinite(torch.tensor(losses)).all()
    assert same(after, t.whole_state()) == []
    t.close()


def test_a_run_survives_a_spike_with_skip_and_rollback(job, tmp_path):
    """The spike comes from the first steps at a much too high learning rate, not from the data."""
    spike = ("optimizer.lr=0.3", "optimizer.warmup=0 steps", "train.divergence.spike=1.5", "train.divergence.over=1",
             "checkpoint.every=1 step", "convergence=null")
    jobs = {action: job(tmp_path / action, *spike, f"train.divergence.action={action}", "train.divergence.tries=50")
            for action in ("stop", "skip", "rollback")}
    ends = {action: j.end() for action, j in jobs.items()}
    assert ends["stop"][0] == 1 and "is above 1.5 times" in jobs["stop"].said(), jobs["stop"].said()[-2000:]
    for action in ("skip", "rollback"):
        said, rows = jobs[action].said(), read_lines(tmp_path / action / "metrics.jsonl")
        assert ends[action] == [0, 0], said[-3000:]
        assert [row["step"] for row in rows] == list(range(1, 21))
        left_out = [row["step"] for row in rows if "left_out" in row]
        assert left_out and all("train/loss" not in row for row in rows if "left_out" in row)
    assert "; update skipped" in jobs["skip"].said()
    assert "; rolling back to step" in jobs["rollback"].said() and "resuming after step" in jobs["rollback"].said()


def test_a_new_run_that_diverges_before_its_first_checkpoint_gives_up_after_its_tries(stopped, job, tmp_path):
    """It rolls back to the checkpoint of the other run each time and counts the tries."""
    source = stopped[0] / "checkpoints/step-00000015"
    run = job(tmp_path / "new", "optimizer.lr=1e30", "train.divergence.action=rollback", "train.divergence.tries=2",
              "checkpoint.every=9 steps", "train.duration=24 steps", resume=str(source))
    assert run.end()[0] == 1, run.said()[-3000:]
    assert run.said().count("rolling back to step 15") == 2
    assert "all 2 tries (train.divergence.tries) are used up" in run.said()


# ---- exported

@pytest.fixture(scope="module")
def logits_of_the_run(reference):
    """Images, and the logits of the model that the run itself exported."""
    import torch
    from transformers import ViTForImageClassification

    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images.expand(8, 3, 8, 8)  # a grey image as RGB, which the export takes
    vit = ViTForImageClassification.from_pretrained(reference(2) / "model").eval()
    with torch.no_grad():
        return images, vit(images).logits


def exported(run, out, form):
    from prelora_ds.exporting.convert import export_checkpoint

    assert export_checkpoint(run, out, form).name == "step-00000020"
    return out


def test_hf_from_a_checkpoint_is_the_run_s_own_export_bit_for_bit(reference, tmp_path):
    out = exported(reference(2), tmp_path / "hf", "hf")
    assert (out / "model.safetensors").read_bytes() == (reference(2) / "model/model.safetensors").read_bytes()


def test_peft_opens_adapter_and_base_with_the_same_logits(reference, tmp_path, logits_of_the_run):
    import torch
    from peft import PeftModel
    from transformers import ViTForImageClassification

    out, (images, expected) = exported(reference(2), tmp_path / "peft", "peft"), logits_of_the_run
    base = ViTForImageClassification.from_pretrained(out / "base").eval()
    with torch.no_grad():
        assert (base(images).logits - expected).abs().max() > 1e-4  # the adapter has an effect
        got = PeftModel.from_pretrained(base, out).eval()(images).logits
    assert torch.allclose(got, expected, atol=1e-5)


def test_timm_opens_its_folder_with_the_same_logits(reference, tmp_path, logits_of_the_run):
    import timm
    import torch

    out, (images, expected) = exported(reference(2), tmp_path / "timm", "timm"), logits_of_the_run
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    with torch.no_grad():
        assert torch.allclose(model.eval()(images[:, :1]), expected, atol=1e-4)


def test_pipeline_classifies_every_image_as_evaluate_does(reference, shards, tmp_path, monkeypatch):
    """The digits are grey, and the run's own folder is moved. Its card has the accuracy of training."""
    import socket

    from huggingface_hub import ModelCard
    from transformers import pipeline

    from prelora_ds.data.manifest import Manifest
    from prelora_ds.data.store import SampleStore
    from prelora_ds.run.evaluate import evaluate_folder

    def refuse(*_):
        raise OSError("a test used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, data = Path(shutil.copytree(reference(2) / "model", tmp_path / "moved")), Manifest.load(shards / "val")
    classify, store, correct, among5 = pipeline("image-classification", str(model)), SampleStore(data), 0, 0
    for sample in range(len(data)):
        image, label = store.read(sample)
        found = [score["label"] for score in classify(Image.open(io.BytesIO(image)), top_k=5)]
        correct += found[0] == data.classes[label]
        among5 += data.classes[label] in found
    result = evaluate_folder(model, shards / "val")
    assert (correct, among5) == (result.correct, result.correct5)

    card = ModelCard.load(model / "README.md")
    last = [row["val/acc1"] for row in read_lines(reference(2) / "metrics.jsonl") if "val/acc1" in row][-1]
    assert [r.metric_value for r in card.data.eval_results if r.metric_name.startswith("Top-1")] == [last]
    assert [line.split(" | ")[0] for line in card.text.splitlines() if line.startswith("| ")][1:] == [
        "| full", "| warmup", "| lora"]
    assert "had not begun" not in card.text and "a checkpoint after step" not in card.text
    written = [path.read_bytes() for path in model.iterdir()]
    assert not any(str(reference(2).parent).encode() in content for content in written)
    assert not any(str(shards).encode() in content for content in written)


def test_deepspeed_opens_its_folder_with_weights_and_moments(reference, pools, tmp_path):
    pools(1).run(open_with_deepspeed, run=str(reference(2)), out=str(tmp_path / "deepspeed"))


def open_with_deepspeed(run, out):
    """An engine with other weights loads the folder, with the masters and moments of the checkpoint."""
    import torch

    from prelora_ds.config.load import load_config
    from prelora_ds.engine.build import build_engine
    from prelora_ds.engine.fragments import adam_state, fragments
    from prelora_ds.engine.state import EngineState
    from prelora_ds.exporting.convert import export_checkpoint
    from prelora_ds.model.families import find_layout
    from prelora_ds.model.vit import build_model
    from prelora_ds.run.checkpoints.resume import read_checkpoint

    folder = export_checkpoint(Path(run), Path(out), "deepspeed")
    config = load_config(Path(run) / "config.yaml",
                         ["train.micro_batch_size=64", "deepspeed.zero_optimization.stage=2"])
    module = build_model(config.model, 10)
    layout = find_layout(module, config.lora.families)
    found, zeros = read_checkpoint(folder, layout, 0, 1), read_checkpoint(folder, layout, 0, 1)
    for s in zeros.engine.slices.values():
        s.value, s.moments = torch.zeros_like(s.value), {key: torch.zeros_like(m) for key, m in s.moments.items()}
    engine = build_engine(config, found.run.phase.plan, layout, 10,
                          EngineState(zeros.engine.slices, found.engine.adam_steps, found.engine.buffers))
    path, _ = engine.ds.load_checkpoint(out)
    assert path is not None
    inner, seen = adam_state(engine.ds), 0
    for f in fragments(engine.ds):
        held = found.engine.slices[f.name]
        assert torch.equal(f.of(f.flat), held.value), f.name
        assert torch.equal(f.of(inner[f.flat]["exp_avg_sq"]), held.moments["exp_avg_sq"]), f.name
        seen += 1
    assert seen == len(found.engine.adam_steps) > 0
    from prelora_ds.engine.release import release

    release(engine)


def test_an_impossible_export_is_refused(stopped, tmp_path, capsys):
    from prelora_ds.errors import ConfigError
    from prelora_ds.exporting.convert import export_checkpoint

    full = stopped[0] / "checkpoints/step-00000003"
    with pytest.raises(ConfigError, match="is in phase full and has no adapters\n  remedy: choose hf"):
        export_checkpoint(full, tmp_path / "out", "peft")
    with pytest.raises(ConfigError, match="is not a known format"):
        export_checkpoint(full, tmp_path / "out", "onnx")
    with pytest.raises(ConfigError, match=r"OUT = .* exists"):
        export_checkpoint(full, tmp_path, "hf")
    assert not (tmp_path / "out").exists()


def test_the_list_of_checkpoints_verifies_each(stopped, tmp_path):
    out = copied(stopped, tmp_path)
    (out / "checkpoints/step-00000012/state.json").write_text("{}")
    from typer.testing import CliRunner

    from prelora_ds.cli import app

    lines = CliRunner().invoke(app, ["checkpoints", str(out)]).output.splitlines()
    assert [line.split()[0] for line in lines] == [f"step-{step:08d}" for step in (15, 12, 10, 9, 6, 3)]
    assert "acc1 " in lines[2] and not any("acc1 " in line for line in (*lines[:2], *lines[3:]))  # evaluated there
    assert "lora" in lines[0] and "2 ranks, ZeRO 2" in lines[0] and "+ base-" in lines[0] and "verified" in lines[0]
    assert "BROKEN: " in lines[1] and "state.json: is 2 bytes" in lines[1] and "full" in lines[-1]


# ---- read at another world size, and at another stage

@pytest.mark.parametrize(("before", "after"), [((2, "zero2"), (1, "zero3")), ((1, "zero1"), (2, "zero2_offload")),
                                               ((2, "zero3"), (2, "zero0"))])
def test_state_is_read_bitwise_at_another_world_size_and_stage(pools, tmp_path, before, after):
    """Compare masters, moments and steps of the LoRA phase, and the frozen weights in the base."""
    whole = pools(before[0]).run(save_in_lora_phase, zero=before[1], folder=str(tmp_path))[0]
    for state, digest, held in pools(after[0]).run(load_elsewhere, zero=after[1], folder=str(tmp_path)):
        assert same_state(whole[0], state) == []
        assert whole[1] == digest
        assert held <= whole[2] / after[0] + 64 * len(whole[0])  # no rank reads more than its part


def test_fewer_ranks_read_bitwise_what_four_ranks_wrote(job, reference, tmp_path):
    """Join a LoRA-phase checkpoint from the files of 4 ranks, and from the shares of 1, 2 and 3 ranks."""
    import torch

    from prelora_ds.config.load import load_config
    from prelora_ds.model.families import find_layout
    from prelora_ds.model.vit import build_model
    from prelora_ds.run.checkpoints.resume import read_checkpoint

    out = tmp_path / "out"
    ended = job(out, world=4, zero=3,
                faults={3: {"place": "step", "call": 14, "delay": 0, "signal": int(signal.SIGUSR1)}})
    assert ended.end() == [99] * 4, ended.said()[-3000:]
    config = load_config(out / "config.yaml")
    layout = find_layout(build_model(config.model, 10), config.lora.families)
    folder = list_checkpoints(out / "checkpoints")[0]

    def whole(world):
        found = {}
        for rank in range(world):
            for name, s in read_checkpoint(folder, layout, rank, world).engine.slices.items():
                for key, part in {"value": s.value, **s.moments}.items():
                    found.setdefault((name, key), []).append((s.start, part))
        return {k: torch.cat([p for _, p in sorted(parts, key=lambda x: x[0])]) for k, parts in found.items()}

    four = whole(4)
    assert len(four) > 60 and {key for _, key in four} == {"value", "exp_avg", "exp_avg_sq"}
    for world in (1, 2, 3):
        fewer = whole(world)
        assert fewer.keys() == four.keys()
        assert all(torch.equal(fewer[k].view(torch.uint8), four[k].view(torch.uint8)) for k in four)
    moved = job(out, "train.micro_batch_size=32", world=2, zero=0)
    assert moved.end() == [0, 0], moved.said()[-3000:]
    for row, other in zip(read_lines(out / "metrics.jsonl"), read_lines(reference(2) / "metrics.jsonl"), strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], abs=2e-2)


def same_state(a, b):
    from support.runs import same

    return same(a, b)


def run_state(plan, step):
    from prelora_ds.core.controller import PhaseState
    from prelora_ds.core.divergence import DivergenceWatch
    from prelora_ds.run.run_state import RunState

    return RunState(step, PhaseState(plan), DivergenceWatch())


def save_in_lora_phase(zero, folder):
    from support.runs import Trainer, config

    from prelora_ds.core.schedule import Timeline
    from prelora_ds.engine.transition import transition
    from prelora_ds.run.checkpoints.saver import Saver

    t = Trainer(config(zero, micro=2))
    saver = Saver(RunFolder(Path(folder)), t.cfg, Timeline(1000, 8, t.cfg.train.duration), print)
    for plan in (t.warmup, t.lora):
        t.train(2)
        t.engine, _ = transition(t.engine, plan, keep_frozen=saver.save_frozen)
    t.train(2)
    assert saver.base is not None and saver.save(t.engine, run_state(t.engine.plan, 6), wait=True)
    state, digest = t.whole_state(), weights_digest(t.engine)
    nbytes = sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors"))
    t.close()
    saver.close()
    return state, digest, nbytes


def weights_digest(engine):
    """Return a digest of all BF16 weights, including the frozen ones."""
    import hashlib

    import torch

    from prelora_ds.engine.measure import gathered
    from prelora_ds.model.families import named_parameters

    digest = hashlib.sha256()
    for p in named_parameters(engine.module).values():
        with gathered(engine, [p]) as (value,):
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_elsewhere(zero, folder):
    import torch.distributed as dist
    from support.runs import LABELS, Trainer, config

    from prelora_ds.engine.build import build_engine
    from prelora_ds.engine.release import release
    from prelora_ds.run.checkpoints.resume import load_newest, resumable_checkpoints

    world = dist.get_world_size()
    t = Trainer(config(zero, micro=8 // world))
    release(t.engine)
    run = RunFolder(Path(folder))
    found = load_newest(resumable_checkpoints(run, "auto"), run, t.layout, print)
    held = found.engine.host_bytes()
    t.engine = build_engine(t.cfg, found.run.phase.plan, t.layout, LABELS, found.engine, found.counters)
    assert t.engine.counters().global_steps == 6 == found.run.step
    state, digest = t.whole_state(), weights_digest(t.engine)
    t.close()
    return state, digest, held
