"""The model card of an export, and what no exported file may contain."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.checkpoints import rewrite_state
from support.runs import SMALL, config
from typer.testing import CliRunner

from prelora_ds.cli import app
from prelora_ds.data.manifest import data_name
from prelora_ds.errors import ConfigError
from prelora_ds.exporting.card import CARD, Phase, Trained, record_accuracy, write_card
from prelora_ds.exporting.convert import FORMATS, export_checkpoint
from prelora_ds.run.accuracy import StoredAccuracy
from prelora_ds.version import git_commit

FIXTURE = Path(__file__).parents[2] / "fixtures" / "run_of_0.1.0" / "run"
IDENTITY = "360 samples, index b16fb2d4"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE, tmp_path / "run"))


def values(card: ModelCard) -> dict[str | None, object]:
    return {result.metric_name: result.metric_value for result in card.data.eval_results or ()}


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "deepspeed"])
def test_the_card_states_the_recipe_the_phases_and_what_was_not_run(run: Path, form: str, tmp_path: Path) -> None:
    export_checkpoint(run, tmp_path / "out", form)
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert card.data.library_name == {"hf": "transformers"}.get(form, form)
    assert card.data.license is None and card.data.pipeline_tag == "image-classification"
    assert card.data.eval_results is None  # the checkpoint was not evaluated
    text = " ".join(card.text.split())
    assert "# vit_tiny_debug" in text and "for 10 classes" in text
    assert f"Validation data: digits/val ({IDENTITY})." in text
    assert "These weights were not evaluated." in text
    assert "a checkpoint after step 16" in text and "`prelora evaluate` had not been run" in text
    rows = re.findall(r"^\| (full|warmup|lora) \| (\d+) \| ([\d,]+) \| (.+) \|$", card.text, re.MULTILINE)
    logged = [json.loads(line) for line in (run / "plans.jsonl").read_text().splitlines()]
    plans = [row for row in logged if row["event"] == "plan"]
    assert [row[:3] for row in rows] == [
        (plan["phase"], str(plan["step"] + 1), f"{plan['trainable_parameters']:,}") for plan in plans
    ]
    ranks = [spec["rank"] for spec in plans[-1]["plan"]["adapters"].values()]
    assert rows[0][3] == "no adapters"
    assert rows[-1][3].startswith(f"{min(ranks)} to {max(ranks)}, ") and f"in {len(ranks)} linears" in rows[-1][3]
    assert "weight_decay: " in card.text and "data/digits" not in card.text


LOST: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: path.unlink(),
    "damaged": lambda path: path.write_text('{"event": "plan"\n'),
    "of another kind": lambda path: path.write_text('{"event": "plan", "step": 0, "plan": {"phase": 1}}\n'),
    "an endless device": lambda path: (path.unlink(), path.symlink_to("/dev/full")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("logs", LOST)
@pytest.mark.timeout(60)
def test_without_logs_the_card_has_the_phase_of_the_checkpoint(run: Path, logs: str, tmp_path: Path) -> None:
    LOST[logs](run / "plans.jsonl")
    export_checkpoint(run, tmp_path / "out", "hf")
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (.+?) \| (.+) \|$", (tmp_path / "out" / CARD).read_text(), re.MULTILINE)
    assert [row[:3] for row in rows] == [("lora", "13", "not known")]


def finish(run: Path, accuracy: str) -> None:
    """Let the run's log say that it ended at its newest checkpoint, and store an accuracy.json."""
    with (run / "plans.jsonl").open("a") as log:
        log.write(json.dumps({"event": "end", "step": 16, "peak_rss_bytes": [1]}) + "\n")
    (run / "model").mkdir()
    (run / "model/accuracy.json").write_text(accuracy)


def evaluated(state: dict) -> None:
    state["run"] |= {"accuracy": {"correct": 90, "samples": 360, "loss": 1.0}, "evaluated_at": 16}


def test_the_results_of_training_and_of_evaluate_are_told_apart(run: Path, tmp_path: Path) -> None:
    rewrite_state(run / "checkpoints/step-00000016", evaluated)
    export_checkpoint(run, tmp_path / "trained", "hf")
    card = ModelCard.load(tmp_path / "trained" / CARD)
    assert values(card) == {"Top-1 accuracy (in training, BF16)": 0.25}
    assert "in training, BF16: 90 of 360 images of digits/val" in card.text

    result = {"correct": 91, "samples": 360, "correct5": 300, "data": "/home/x/digits/val", "identity": IDENTITY}
    finish(run, json.dumps(result))
    export_checkpoint(run, tmp_path / "evaluated", "timm")
    card = ModelCard.load(tmp_path / "evaluated" / CARD)
    assert values(card) == {"Top-1 accuracy (prelora evaluate, fp32)": 91 / 360,
                            "Top-5 accuracy (prelora evaluate, fp32)": 300 / 360}
    [index] = card.data.to_dict()["model-index"]
    assert index["name"] == "vit_tiny_debug"
    assert index["results"][0]["dataset"] == {"name": "digits/val", "type": "webdataset", "revision": IDENTITY}
    assert "had not been run" not in card.text and "a checkpoint after step" not in card.text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"correct": 9}', '{"correct": 9, "samples": 8}',
                                     '{"correct": 5, "samples": 8, "correct5": 4}'])
def test_a_damaged_accuracy_is_refused_and_nothing_is_written(run: Path, content: str, tmp_path: Path) -> None:
    finish(run, content)
    with pytest.raises(ConfigError) as refused:
        export_checkpoint(run, tmp_path / "out", "hf")
    assert refused.value.value == str(run / "model/accuracy.json") and not (tmp_path / "out").exists()


def test_an_accuracy_of_an_earlier_version_has_neither_top_5_nor_a_name_of_the_data(run: Path, tmp_path: Path) -> None:
    finish(run, '{"acc1": 0.5, "correct": 180, "samples": 360, "loss": 1.5}')
    export_checkpoint(run, tmp_path / "out", "hf")
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert values(card) == {"Top-1 accuracy (prelora evaluate, fp32)": 0.5}
    assert card.data.eval_results[0].dataset_name == "unnamed data"


def test_evaluate_writes_top_1_and_top_5_into_accuracy_and_card(run: Path, shards: Path, tmp_path: Path) -> None:
    rewrite_state(run / "checkpoints/step-00000016", evaluated)
    out = tmp_path / "out"
    export_checkpoint(run, out, "hf")
    text = ModelCard.load(out / CARD).text
    for _ in range(2):  # the second result replaces the first
        done = CliRunner().invoke(app, ["evaluate", str(out), "--data", str(shards / "val")])
        assert done.exit_code == 0, done.output
        found = json.loads((out / "accuracy.json").read_text())
        assert found["acc1"] == found["correct"] / 360 and found["acc5"] == found["correct5"] / 360
        assert f"{found['correct']} of 360 correct" in done.output
        assert f"{found['correct5']} among the first five" in done.output
        assert found["data"] == data_name(str(shards / "val")) and found["identity"] == IDENTITY
        card = ModelCard.load(out / CARD)
        assert values(card) == {"Top-1 accuracy (prelora evaluate, fp32)": found["acc1"],
                                "Top-5 accuracy (prelora evaluate, fp32)": found["acc5"]}
        assert card.text == text
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in out.iterdir())
    assert not any(str(shards).encode() in path.read_bytes() for path in out.iterdir())


@pytest.mark.parametrize("content", ["# mine\n", "---\nlicense: mit\n---\n# mine\n"])
def test_a_card_of_somebody_else_is_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(content)
    record_accuracy(tmp_path, StoredAccuracy(correct=1, samples=2))
    assert (tmp_path / CARD).read_text() == content


@pytest.mark.parametrize("content", ["---\n[\n---\n", "---\n- a\n---\n"])
def test_a_card_that_cannot_be_read_is_a_warning(
    content: str, run: Path, shards: Path, tmp_path: Path
) -> None:
    export_checkpoint(run, tmp_path / "out", "hf")
    (tmp_path / "out" / CARD).write_text(content)
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "out"), "--data", str(shards / "val")])
    assert done.exit_code == 0 and "warning: the result could not be written into" in done.stderr
    assert (tmp_path / "out" / CARD).read_text() == content and (tmp_path / "out/accuracy.json").is_file()


def test_the_card_of_a_factory_s_module_names_the_factory(tmp_path: Path) -> None:
    cfg = config(model={**SMALL, "factory": "support.models:mlp", "factory_args": {"width": 8, "root": "/secret"},
                        "families": {"up": r"blocks\.(?P<layer>\d+)\.up"}}, lora={"families": ["up"]})
    settings = cfg.model_dump(mode="json")
    trained = Trained(settings, 3, [Phase("full", 1, [], 7)], {}, None, True, {})
    write_card(tmp_path, "hf", trained, cfg, ["a", "b"])
    card = ModelCard.load(tmp_path / CARD)
    assert "Phase warmup of the recipe had not begun." in card.text
    assert card.data.library_name is None and "A module of the factory `support.models:mlp`" in card.text
    assert "/secret" not in card.text


@pytest.mark.parametrize("name", ["--- {{ x }}", "a: [b", "# 'c' | `d`", "ü\u2028", "---\nlicense: mit"])
def test_a_run_may_have_any_name(name: str, run: Path, tmp_path: Path) -> None:
    def rename(state: dict) -> None:
        evaluated(state)
        state["config"]["run"]["name"] = name

    rewrite_state(run / "checkpoints/step-00000016", rename)
    export_checkpoint(run, tmp_path / "out", "hf")
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert card.data.model_name == name and card.data.license is None and f"# {name}" in card.text
    assert values(card) == {"Top-1 accuracy (in training, BF16)": 0.25}


def test_the_commit_is_that_of_the_checkout() -> None:
    root = Path(__file__).parents[3]
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    found = git_commit()
    assert (None if found is None else found.removesuffix("-dirty")) == (((root / ".git").exists() and head) or None)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "deepspeed"])  # tests/ranks has deepspeed
def test_no_file_has_a_path_a_user_or_a_host(
    run: Path, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "somebody-unusual")
    assert getpass.getuser() == "somebody-unusual"
    monkeypatch.setattr(socket, "gethostname", lambda: "node-unusual")
    home = Path("/home/somebody-unusual")

    def absolute(state: dict) -> None:
        evaluated(state)
        state["config"]["data"] |= {"train": f"{home}/digits/train", "val": f"{home}/digits/val",
                                    "cache_dir": f"{home}/cache"}
        state["config"]["run"]["output_dir"] = f"{home}/out"

    rewrite_state(run / "checkpoints/step-00000016", absolute)
    monkeypatch.chdir(tmp_path)
    export_checkpoint(run, Path("out"), form)
    files = [path for path in Path("out").rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        for text in (str(tmp_path), "unusual", ".partial", "/home/"):
            assert text.encode() not in path.read_bytes(), (path, text)


@pytest.mark.parametrize(("place", "name"), [
    ("data/digits/val", "digits/val"), ("/shards/imagenet/train/", "imagenet/train"), ("/x/imagenet", "imagenet"),
    ("val", "val"), ("./val", "val"), ("/val", "val"), ("", "unnamed data"), ("..", "unnamed data"),
    ("s3://bucket/imagenet/val?token=x", "imagenet/val"), ("https://me:secret@host/val", "val"),
    ("/x/imagenet/train-{0000..1281}.tar", "imagenet"), ("file:///x/cifar/test", "cifar/test"),
])
def test_data_have_a_name_without_the_path_to_them(place: str, name: str) -> None:
    assert data_name(place) == name


def test_a_folder_below_the_home_has_no_name_of_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    assert data_name("/home/alice/train") == "train"


@pytest.mark.parametrize(("place", "name"), [
    ("/scratch/alice/train", "train"), ("/scratch/alice", "scratch"), ("/home/bob/train", "train"),
    ("/lus/alice/val/{000..100}.tar", "val"), ("/work/alice/imagenet/val", "imagenet/val"),
])
def test_a_folder_of_a_user_does_not_name_the_data(place: str, name: str) -> None:
    assert data_name(place) == name
