from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.runs import config
from torch import Tensor

from prelora_ds.core.classes import unnamed
from prelora_ds.data.manifest import Manifest
from prelora_ds.errors import ConfigError
from prelora_ds.exporting.hf import export_folder, write_model
from prelora_ds.model.vit import build_model
from prelora_ds.run.evaluate import Accuracy, evaluate, evaluate_folder

LABELS = 3


def one_hot_of(images: Tensor) -> Tensor:
    """Return the logits of a model that predicts class ``images[i, 0]``, with a margin of 4."""
    return 4.0 * torch.nn.functional.one_hot(images[:, 0], LABELS).float()


def batch(said: list[int], labels: list[int], mask: list[bool] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.tensor(said).view(-1, 1), torch.tensor(labels),
            torch.tensor([True] * len(said) if mask is None else mask))


RIGHT, WRONG = math.log1p(2 * math.exp(-4)), 4 + math.log1p(2 * math.exp(-4))


def test_counts_and_loss_by_hand() -> None:
    found = evaluate(one_hot_of, [batch([0, 1, 2], [0, 1, 0]), batch([2, 2], [2, 1])], samples=5)
    assert (found.correct, found.samples) == (3, 5)
    assert found.acc1 == 0.6
    assert found.loss == pytest.approx((3 * RIGHT + 2 * WRONG) / 5, rel=1e-5)


def test_a_sample_whose_logits_are_not_finite_counts_as_wrong() -> None:
    """argmax would choose NaN, so a diverged model would be correct for one of ten classes."""
    def logits_of(images: Tensor) -> Tensor:
        logits = one_hot_of(images)
        logits[0, 1] = torch.nan
        return logits

    found = evaluate(logits_of, [batch([1, 2], [1, 2])], samples=2)
    assert found.correct == 1 and math.isnan(found.loss)


def test_rows_outside_the_mask_do_not_count() -> None:
    batches = [batch([0, 1, 0], [0, 2, 0], [True, True, False]), batch([1, 0], [0, 0], [False, False])]
    assert evaluate(one_hot_of, batches, samples=2) == Accuracy(1, 2, pytest.approx((RIGHT + WRONG) / 2, rel=1e-5))


rows = st.lists(st.tuples(st.integers(0, LABELS - 1), st.integers(0, LABELS - 1), st.booleans()), min_size=1,
                max_size=30)


def test_top_5_by_hand_with_ties_in_the_order_of_the_classes() -> None:
    logits = torch.tensor([[6., 5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0],
                           [torch.nan, 0, 0, 0, 0, 0, 0], [9, 8, 7, 6, 5, 4, 3]])
    labels, mask = torch.tensor([5, 4, 5, 0, 1, 4]), torch.tensor([True] * 5 + [False])
    found = evaluate(lambda images: images, [(logits, labels, mask)], samples=5)
    assert (found.correct, found.correct5) == (1, 2)
    assert found.acc5 == 0.4


@pytest.mark.parametrize(("classes", "counted"), [(5, False), (6, True)])
def test_top_5_is_measured_for_more_than_five_classes(classes: int, counted: bool) -> None:
    logits = torch.randn(40, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % classes
    found = evaluate(lambda images: images, [(logits, labels, torch.ones(40, dtype=torch.bool))], samples=40)
    among5 = sum(int(label) in row.topk(5).indices for row, label in zip(logits, labels, strict=True))
    assert found.correct5 == (among5 if counted else None)


@settings(deadline=None)  # other work on the machine would count
@given(rows, st.integers(1, 7))
def test_counts_are_exact_for_any_batches_and_mask(rows: list[tuple[int, int, bool]], size: int) -> None:
    batches = [batch(*map(list, zip(*rows[i:i + size], strict=True))) for i in range(0, len(rows), size)]
    counted = [(said, label) for said, label, mask in rows if mask]
    assume(counted)
    found = evaluate(one_hot_of, batches, samples=len(counted))
    assert (found.correct, found.samples) == (sum(said == label for said, label in counted), len(counted))
    assert found.loss == pytest.approx(sum(RIGHT if s == y else WRONG for s, y in counted) / len(counted), rel=1e-5)


@pytest.mark.parametrize("samples", [0, 2, 4, 100])
def test_another_count_than_that_of_the_data_set_is_an_error(samples: int) -> None:
    with pytest.raises(RuntimeError, match=f"the evaluation counted 3 samples of {samples}"):
        evaluate(one_hot_of, [batch([0, 1, 2, 0], [0, 1, 0, 0], [True, True, True, False])], samples=samples)


def test_the_count_is_checked_after_the_sum_over_ranks() -> None:
    seen = []

    def double(tensor: Tensor) -> None:  # a second rank with the same rows
        seen.append(tensor.dtype)
        tensor.mul_(2)

    one = [batch([0, 1, 2], [0, 1, 0])]
    found = evaluate(one_hot_of, one, samples=6, reduce=double)
    assert (found.correct, found.samples) == (4, 6)
    assert found.loss == pytest.approx((2 * RIGHT + WRONG) / 3, rel=1e-5)
    assert seen == [torch.int64, torch.float64]
    with pytest.raises(RuntimeError, match="counted 6 samples of 3"):
        evaluate(one_hot_of, one, samples=3, reduce=double)


def test_no_gradients_are_recorded() -> None:
    weight = torch.ones(1, requires_grad=True)

    def model(images: Tensor) -> Tensor:
        logits = one_hot_of(images) * weight
        assert not logits.requires_grad
        return logits

    assert evaluate(model, [batch([0], [0])], samples=1).correct == 1


def test_a_folder_that_is_not_a_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate_folder(tmp_path, tmp_path / "none")
    assert caught.value.key == "--data"


# ---- an exported folder

TINY = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 16,
}


def export(folder: Path, classes: Sequence[str]) -> Path:
    """Export a model with random weights, as a run does."""
    cfg = config(model=TINY, data={"crop": "none"})
    torch.manual_seed(0)
    with export_folder(folder, replace=True) as partial:
        write_model(build_model(cfg.model, len(classes)).state_dict(), cfg, classes, partial)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("model") / "model", [*map(str, range(10))])


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def test_the_result_names_the_data_and_their_fingerprint(
    model: Path, shards: Path
) -> None:
    result = evaluate_folder(model, shards / "val")
    manifest = Manifest.load(shards / "val")
    assert (result.samples, result.data, result.identity) == (360, str(shards / "val"), manifest.fingerprint)


@pytest.mark.parametrize(("classes", "problem"), [
    ([f"c{i}" for i in range(12)], "has 10 classes, but the model in .* has 12"),
    ([f"c{i}" for i in range(5)], "has 10 classes, but the model in .* has 5"),
    ([*map(str, range(8)), "9", "8"], "has '8' as class 8, but the model in .* has '9'"),
])
def test_data_with_other_classes_than_the_model_are_refused(
    classes: list[str], problem: str, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        evaluate_folder(export(tmp_path / "model", classes), shards / "val")
    assert caught.value.key == "--data"


def test_only_the_number_of_classes_is_compared_for_a_model_without_class_names(
    shards: Path, tmp_path: Path
) -> None:
    assert (
        evaluate_folder(export(tmp_path / "ten", unnamed(10)), shards / "val").samples
        == 360
    )
    with pytest.raises(ConfigError, match=r"has 10 classes, but the model in .* has 9"):
        evaluate_folder(export(tmp_path / "nine", unnamed(9)), shards / "val")


def test_an_export_of_an_earlier_version_takes_grey_images(shards: Path, tmp_path: Path) -> None:
    """It has one channel and no class names. Today's export of the same weights takes RGB images."""
    cfg = config(model=TINY, data={"crop": "none"})
    torch.manual_seed(0)
    vit: Any = build_model(cfg.model, 10)
    vit.config.eval_crop = "none"
    vit.save_pretrained(tmp_path / "old")
    old = evaluate_folder(tmp_path / "old", shards / "val")
    new = evaluate_folder(export(tmp_path / "new", unnamed(10)), shards / "val")
    assert (old.correct, old.correct5) == (new.correct, new.correct5)
    assert old.loss == pytest.approx(new.loss, rel=1e-6)


def edited(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | values
    path.write_text(
        json.dumps({key: value for key, value in content.items() if value is not Ellipsis})
    )


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no folder": lambda folder: shutil.rmtree(folder),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut weights": lambda folder: os.truncate(folder / "model.safetensors", 500),
    "other weights": lambda folder: (folder / "model.safetensors").write_bytes(b"<html>404</html>"),
    "a weight is missing": lambda folder: save_file(
        {
            name: t
            for name, t in load_file(folder / "model.safetensors").items()
            if name != "classifier.bias"
        },
        folder / "model.safetensors",
        {"format": "pt"},
    ),
    "empty config": lambda folder: (folder / "config.json").write_bytes(b""),
    "garbage config": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"),
    "config is a list": lambda folder: (folder / "config.json").write_text("[1]"),
    "config is deep": lambda folder: (folder / "config.json").write_text("[" * 9999),
    "another model": lambda folder: edited(folder, model_type="bert"),
    "image size": lambda folder: edited(folder, image_size=16),
    "image size is text": lambda folder: edited(folder, image_size="8"),
    "no image size": lambda folder: edited(folder, image_size=...),
    "2 channels": lambda folder: edited(folder, num_channels=2),
    "1 channel": lambda folder: edited(folder, num_channels=1),
    "channels of the images": lambda folder: edited(folder, eval_channels=4),
    "crop": lambda folder: edited(folder, eval_crop="middle"),
    "hidden size": lambda folder: edited(folder, hidden_size=16),
    "hidden size is text": lambda folder: edited(folder, hidden_size="x"),
    "labels with a gap": lambda folder: edited(folder, id2label={"0": "0", "2": "1"}),
    "no labels": lambda folder: edited(folder, id2label={}),
    "fewer labels": lambda folder: edited(folder, id2label={"0": "0"}),
    "factory": lambda folder: (folder / "factory.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_folder_is_refused_with_one_message(
    damage: str, copied: Path, shards: Path
) -> None:
    DAMAGES[damage](copied)
    with pytest.raises(ConfigError) as caught:
        evaluate_folder(copied, shards / "val")
    assert (caught.value.key, caught.value.value) == ("MODEL", str(copied)) and caught.value.remedy
    assert "\n" not in caught.value.problem
