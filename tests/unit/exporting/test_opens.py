"""The exports, opened by the libraries that they are for: in a folder that was moved, and without a network."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import config
from torch.nn import functional

from prelora_ds.config.tree import Config
from prelora_ds.data.decode import decode
from prelora_ds.data.transforms import eval_short_side, eval_transform, to_float
from prelora_ds.exporting.convert import export_checkpoint
from prelora_ds.exporting.hf import LUMA, PATCHES, image_processor, with_rgb_patches, write_model
from prelora_ds.exporting.timm import crop_pct, write_timm
from prelora_ds.model.vit import build_model

RUN = Path(__file__).parents[2] / "fixtures" / "run_of_0.1.0" / "run"
CLASSES = ["cat", "dog", "eel", "fox", "gnu", "hen", "ibis"]
# timm truncates 56 * (488 / 56) to 487.
SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 488}
# Heights and widths. With inception crops, no margin of the longer side leaves the remainder 3 (see below).
SHAPES = [(32, 32), (37, 37), (20, 20), (90, 90), (60, 80), (65, 50), (33, 200)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("a test used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def pictures(mode: str) -> list[Image.Image]:
    """Return images with structure at every scale."""
    rng = np.random.default_rng(0)
    channels = 1 if mode == "L" else 3
    found = []
    for height, width in SHAPES:
        pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, channels), dtype=np.uint8).squeeze())
        pixels = pixels // 2 + np.asarray(coarse.resize((width, height))).reshape(pixels.shape) // 2
        found.append(Image.fromarray(pixels.squeeze(), mode))
    return found


def prepared(image: Image.Image, cfg: Config) -> torch.Tensor:
    """Return [1, C, S, S] as `prelora evaluate` and training prepare an image."""
    png = io.BytesIO()
    image.save(png, "PNG")
    pixels = decode(png.getvalue(), cfg.model.num_channels)
    cropped = eval_transform(pixels, image_size=cfg.model.image_size, crop=cfg.data.crop)
    return to_float(cropped[None], torch.float32)


def model_of(cfg: Config) -> Any:
    """Return a model whose logits are as far apart as those of a trained one."""
    torch.manual_seed(0)
    model: Any = build_model(cfg.model, len(CLASSES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim > 1:
                parameter.normal_(0, 3 * parameter[0].numel() ** -0.5)
    return model.eval()


@torch.no_grad()
def logits(model: Any, images: torch.Tensor) -> torch.Tensor:
    found = model(images)
    return found if isinstance(found, torch.Tensor) else found.logits


@contextlib.contextmanager
def epsilon(model: torch.nn.Module, value: float) -> Iterator[None]:
    """Let the norms of ``model`` use another epsilon."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    before = {norm.eps for norm in norms}
    for norm in norms:
        norm.eps = value
    yield
    assert before == {1e-12}
    for norm in norms:
        norm.eps = 1e-12


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Return a function that moves a folder, and let the test run in a third one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def move(folder: Path) -> Path:
        target = tmp_path / "new place" / folder.name
        target.parent.mkdir()
        return Path(shutil.move(folder, target))

    return move


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("crop", ["inception", "pad", "none"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_pipeline_classifies_as_we_do(
    crop: str, channels: int, loss: str, moved: Callable[[Path], Path], tmp_path: Path
) -> None:
    from transformers import pipeline

    cfg = config(model={**SIZES, "num_channels": channels}, data={"crop": crop}, train={"loss": loss})
    model = model_of(cfg)
    (tmp_path / "hf").mkdir()
    write_model(model.state_dict(), cfg, CLASSES, tmp_path / "hf")
    classify = pipeline("image-classification", str(moved(tmp_path / "hf")))
    for image in pictures("RGB" if channels == 3 else "L"):
        expected = logits(model, prepared(image, cfg))[0]
        scores = expected.softmax(0) if loss == "softmax" else expected.sigmoid()
        found = classify(image, top_k=len(CLASSES))
        assert found[0]["label"] == CLASSES[int(expected.argmax())]
        assert {s["label"]: s["score"] for s in found} == pytest.approx(
            dict(zip(CLASSES, scores.tolist(), strict=True)), abs=1e-4
        )


@pytest.mark.parametrize("crop", ["inception", "none"])
def test_a_model_for_grey_images_sees_the_grey_values_of_a_colour_image(crop: str) -> None:
    """Ours are rounded to integers, before and after resizing."""
    cfg = config(model={**SIZES, "num_channels": 1}, data={"crop": crop})
    grey = model_of(cfg).state_dict()
    weight, process = with_rgb_patches(grey)[PATCHES], image_processor(cfg)
    assert torch.allclose(weight.sum(1, keepdim=True), grey[PATCHES], atol=1e-6)
    for image in pictures("RGB"):
        seen = process(images=image, return_tensors="pt")["pixel_values"]
        luma = (seen * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        assert (luma - prepared(image, cfg)).abs().max() < 2 / 127.5
        found = functional.conv2d(seen, weight, stride=8)
        assert torch.allclose(found, functional.conv2d(luma, grey[PATCHES], stride=8), atol=1e-5)


def test_pipeline_takes_grey_arrays_and_files_too(moved: Callable[[Path], Path], tmp_path: Path) -> None:
    from transformers import pipeline

    cfg = config(model={**SIZES, "num_channels": 1}, data={"crop": "none"})
    model = model_of(cfg)
    (tmp_path / "hf").mkdir()
    write_model(model.state_dict(), cfg, CLASSES, tmp_path / "hf")
    classify = pipeline("image-classification", str(moved(tmp_path / "hf")))
    image = pictures("L")[3]
    image.save(tmp_path / "grey.png")
    expected = logits(model, prepared(image, cfg))[0]
    for given in (image, np.asarray(image)[..., None], str(tmp_path / "grey.png")):
        found = classify(given, top_k=1)[0]
        assert found["label"] == CLASSES[int(expected.argmax())]
        assert found["score"] == pytest.approx(float(expected.softmax(0).max()), abs=1e-4)


@pytest.mark.parametrize("crop", ["inception", "none"])
def test_the_image_processor_is_our_transform(crop: str) -> None:
    """The centre is the same, or (see `image_processor`) one pixel further up or left."""
    cfg = config(model=SIZES, data={"crop": crop})
    process, short, shifts = image_processor(cfg), eval_short_side(32), 0
    rng = np.random.default_rng(0)
    for longer in range(short, short + 17):
        shift = int(crop == "inception" and (longer - 32) % 4 == 3)
        shifts += shift
        for down, right, shape in ((0, shift, (short, longer)), (shift, 0, (longer, short)),
                                   (0, shift, (2 * short, 2 * longer))):
            image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
            found = process(images=image, return_tensors="pt")["pixel_values"][..., down:, right:]
            expected = prepared(image, cfg)[..., : 32 - down, : 32 - right]
            assert torch.allclose(found, expected, atol=1e-6), shape
    assert shifts == (4 if crop == "inception" else 0)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("crop", ["inception", "pad", "none"])
def test_timm_gives_our_logits(crop: str, channels: int, moved: Callable[[Path], Path], tmp_path: Path) -> None:
    import timm

    cfg = config(model={**SIZES, "num_channels": channels}, data={"crop": crop})
    model = model_of(cfg)
    (tmp_path / "timm").mkdir()
    write_timm(model.state_dict(), cfg, CLASSES, tmp_path / "timm")
    place = f"local-dir:{moved(tmp_path / 'timm')}"
    default = timm.create_model(place, pretrained=True).eval()
    exact = timm.create_model(place, pretrained=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-12)).eval()
    assert default.pretrained_cfg["label_names"] == CLASSES and default.num_classes == len(CLASSES)
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(default))
    for image in pictures("L" if channels == 1 else "RGB"):
        images = prepared(image, cfg)
        difference = (prepare(image)[None] - images).abs() * 127.5
        # timm resizes with Pillow, which rounds a few values to the next level.
        assert difference.max() < 1.01 and (difference > 0.01).float().mean() < 0.05
        assert torch.allclose(logits(exact, images), logits(model, images), atol=1e-4)
        with epsilon(model, 1e-6):
            assert torch.allclose(logits(default, images), logits(model, images), atol=1e-4)


def test_a_share_reproduces_every_short_side() -> None:
    for size in range(1, 1025):
        assert int(size / crop_pct(size)) == eval_short_side(size)


def test_peft_opens_the_adapter_by_a_relative_base(moved: Callable[[Path], Path], tmp_path: Path) -> None:
    """From any folder with the base given, and by AutoPeftModel in the folder of the adapter."""
    from peft import AutoPeftModel, PeftModel
    from transformers import ViTForImageClassification

    export_checkpoint(RUN, tmp_path / "hf", "hf")
    export_checkpoint(RUN, tmp_path / "peft", "peft")
    folder = moved(tmp_path / "peft")
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = logits(ViTForImageClassification.from_pretrained(tmp_path / "hf").eval(), images)

    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    base = ViTForImageClassification.from_pretrained(folder / "base")
    assert (logits(base.eval(), images) - expected).abs().max() > 1e-4  # the adapter has an effect
    assert torch.allclose(logits(PeftModel.from_pretrained(base, folder).eval(), images), expected, atol=1e-5)
    with contextlib.chdir(folder):
        opened = AutoPeftModel.from_pretrained(".")
    assert torch.allclose(logits(opened.eval(), images), expected, atol=1e-5)
