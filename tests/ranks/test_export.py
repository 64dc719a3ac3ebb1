"""The exports of a checkpoint: exact, complete, with class names, and readable by other libraries."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import ViTForImageClassification

from prelora_ds.errors import ConfigError, NotSavedError
from prelora_ds.exporting.convert import FORMATS, export_checkpoint
from prelora_ds.exporting.timm import mlp_ratio
from prelora_ds.model.families import canonical_name
from prelora_ds.run.checkpoints.checkpoint_folder import list_checkpoints

CLASSES = [f"class {label}" for label in range(10)]
# timm truncates 56 * (488 / 56) to 487.
ODD = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 488,
}


@pytest.fixture(scope="module")
def run(own_pools, tmp_path_factory) -> Path:
    """A run with a checkpoint of the LoRA phase, written by 2 ranks."""
    folder = tmp_path_factory.mktemp("run") / "run"
    own_pools(2).run(make_checkpoint, folder=str(folder))
    return folder


def make_checkpoint(folder: str) -> None:
    from support.runs import Trainer, config

    from prelora_ds.core.controller import PhaseState
    from prelora_ds.core.divergence import DivergenceWatch
    from prelora_ds.core.schedule import Timeline
    from prelora_ds.engine.transition import transition
    from prelora_ds.run.checkpoints.saver import Saver
    from prelora_ds.run.folder import RunFolder
    from prelora_ds.run.run_state import RunState

    t = Trainer(config("zero2", model=ODD, lora={"mode": "merged"}))
    saver = Saver(
        RunFolder(Path(folder)), t.cfg, Timeline(1000, 8, t.cfg.train.duration), print, classes=CLASSES
    )
    for plan in (t.warmup, t.lora):
        t.train(2)
        t.engine, _ = transition(t.engine, plan, keep_frozen=saver.save_frozen)
    t.train(2)
    state = RunState(6, PhaseState(t.engine.plan), DivergenceWatch())
    assert saver.save(t.engine, state, wait=True)
    saver.close()
    t.close()


@pytest.fixture(scope="module")
def hf(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "hf"
    export_checkpoint(run, out, "hf")
    return out


def logits(model: torch.nn.Module) -> torch.Tensor:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        found = model.eval()(images)
    return found if isinstance(found, torch.Tensor) else found.logits


def named(config: dict) -> list[str]:
    assert config["label2id"] == {name: label for label, name in enumerate(CLASSES)}
    return [config["id2label"][str(label)] for label in range(10)]


def test_hf_and_the_base_of_peft_name_the_classes(run, hf, tmp_path):
    from peft import PeftModel

    assert named(json.loads((hf / "config.json").read_text())) == CLASSES
    export_checkpoint(run, tmp_path / "peft", "peft")
    assert named(json.loads((tmp_path / "peft/base/config.json").read_text())) == CLASSES
    base = ViTForImageClassification.from_pretrained(tmp_path / "peft/base")
    both = PeftModel.from_pretrained(base, tmp_path / "peft")
    assert torch.allclose(
        logits(both), logits(ViTForImageClassification.from_pretrained(hf)), atol=1e-5
    )


def test_timm_opens_sizes_that_do_not_divide(run, hf, tmp_path):
    import timm

    export_checkpoint(run, tmp_path / "timm", "timm")
    assert json.loads((tmp_path / "timm/config.json").read_text())["label_names"] == CLASSES
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert torch.allclose(
        logits(model), logits(ViTForImageClassification.from_pretrained(hf)), atol=1e-4
    )


def test_a_ratio_reproduces_every_size():
    assert int(56 * (488 / 56)) == 487
    for width in (*range(1, 300), 768, 1024, 1408):
        for hidden in (*range(1, 300), 488, 3072, 6144, 4 * width + 1):
            assert int(width * mlp_ratio(width, hidden)) == hidden
    with pytest.raises(ConfigError, match="choose another --format"):
        mlp_ratio(3, 2**60 + 1)


def test_deepspeed_s_own_script_opens_its_folder(run, own_pools, tmp_path):
    """Run the script as documented, `python zero_to_fp32.py . OUT`, in a folder that was moved."""
    from safetensors import safe_open

    own_pools(1).run(export_deepspeed, run=str(run), out=str(tmp_path / "deepspeed"))
    out = tmp_path / "moved"
    (tmp_path / "deepspeed").rename(out)
    assert "for 10 classes" in ModelCard.load(out / "README.md").text
    for path in (path for path in out.rglob("*") if path.is_file()):
        for text in (str(tmp_path), "unusual", ".partial"):
            assert text.encode() not in path.read_bytes(), (path, text)
    done = subprocess.run(
        [sys.executable, "zero_to_fp32.py", ".", tmp_path / "fp32"],
        cwd=out,
        text=True,
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, seen = torch.load(tmp_path / "fp32/pytorch_model.bin"), 0
    weights = {canonical_name(name): value for name, value in found.items()}
    [checkpoint], [base] = (
        list_checkpoints(run / "checkpoints"),
        list((run / "checkpoints").glob("base-*")),
    )
    for folder in (base, checkpoint):  # the checkpoint comes last: the weights that train override the base
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                for name, start in json.loads(file.metadata()["starts"]).items():
                    mine = file.get_tensor(f"value/{name}")
                    got = weights[name].reshape(-1)[start : start + mine.numel()]
                    assert torch.equal(got, mine.bfloat16().float() if folder == base else mine), (
                        name
                    )
                    seen += mine.numel()
    assert seen == sum(w.numel() for w in weights.values()) > 0
    states = torch.load(out / checkpoint.name / "mp_rank_00_model_states.pt", weights_only=False)
    assert states["classes"] == CLASSES


def export_deepspeed(run: str, out: str) -> None:
    """Export as a user and on a host whose names can be found in the files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGNAME", "user-unusual")
        patch.setattr(socket, "gethostname", lambda: "host-unusual")
        export_checkpoint(Path(run), Path(out), "deepspeed")


def test_a_checkpoint_of_an_earlier_version_has_numbered_classes(run, tmp_path):
    from support.checkpoints import rewrite_state

    shutil.copytree(run, tmp_path / "run")
    [checkpoint] = list_checkpoints(tmp_path / "run/checkpoints")
    rewrite_state(checkpoint, lambda state: state.pop("classes"))
    export_checkpoint(tmp_path / "run", tmp_path / "hf", "hf")
    labels = json.loads((tmp_path / "hf/config.json").read_text())["id2label"]
    assert labels == {str(label): f"LABEL_{label}" for label in range(10)}


@pytest.mark.parametrize(
    "out",
    [
        "/proc/x",
        "/dev/full/x",
        "{run}",
        "{run}/model",
        "{run}/checkpoints/step-00000099",
        "{run}/checkpoints/../hf",
        "{here}/link",
        "{here}/dangling",
        "{here}/file",
    ],
)
def test_an_invalid_out_is_refused_and_nothing_is_changed(run, out, tmp_path):
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    (tmp_path / "file").write_text("mine")
    before = sorted(run.rglob("*")) + sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(run, Path(out.format(run=run, here=tmp_path)), "hf")
    assert caught.value.key == "OUT"
    assert sorted(run.rglob("*")) + sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_one_message_and_leaves_nothing(run, own_pools, form, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    try:
        [said] = own_pools(1).run(fail_to_export, run=str(run), out=str(disk / "out"), form=form)
        assert f"the model could not be written to {disk / 'out'}: " in said, said
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def fail_to_export(run: str, out: str, form: str) -> str:
    try:
        export_checkpoint(Path(run), Path(out), form)
    except NotSavedError as error:
        return str(error)
    return "it was written"
