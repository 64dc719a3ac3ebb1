"""RandAugment on the scale of Steiner et al. ("How to train your ViT?", 2022), TrivialAugment and RandomErasing.

The level counts tenths of each operation's range, and 15 is one and a half of it, as in big_vision's autoaugment.py:
torchvision spreads its levels over 31 bins (its 15 is half the range, and mirrored), timm cuts 15 down to 10. Pillow
does the work: its operations on interleaved uint8 take a third of the time of torchvision's on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from prelora_ds.config.data import AUGMENT_LEVELS, Augment

_GREY = 128  # what moves in from outside
_CUTOUT, _TRANSLATE = 40.0, 100.0  # pixels at level 10, on a picture of _SIZE
_SIZE = 224

Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Output (x, y) shows the nearest pixel to (a x + b y + c, d x + e y + f)."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.NEAREST,
        fillcolor=(_GREY,) * len(image.getbands()),
    )


def _signed(rng: np.random.Generator, value: float) -> float:
    return value if rng.random() < 0.5 else -value


def _rotate(image: Image.Image, x: float, rng: np.random.Generator) -> Image.Image:
    angle = math.radians(_signed(rng, 30 * x))
    cos, sin = math.cos(angle), math.sin(angle)
    cx, cy = (image.width - 1) / 2, (image.height - 1) / 2
    return _affine(image, cos, -sin, cx - cos * cx + sin * cy, sin, cos, cy - sin * cx - cos * cy)


def _cutout(image: Image.Image, x: float, rng: np.random.Generator) -> Image.Image:
    """A grey square of twice ``40 x`` pixels (on 224), its centre anywhere in the picture."""
    half = round(int(x * _CUTOUT) * image.width / _SIZE)
    cx, cy = (rng.random(2) * image.size).astype(int).tolist()
    image = image.copy()
    image.paste((_GREY,) * len(image.getbands()), (cx - half, cy - half, cx + half, cy + half))
    return image


def _point(image: Image.Image, table: np.ndarray) -> Image.Image:
    return image.point(np.clip(table, 0, 255).astype(np.uint8).tolist() * len(image.getbands()))


def _posterize(image: Image.Image, x: float, rng: np.random.Generator) -> Image.Image:
    bits = min(8, int(4 * x))  # few bits are the strong end: level 10 keeps 4, level 20 all 8
    return _point(image, _VALUES >> (8 - bits) << (8 - bits))


def _solarize(image: Image.Image, x: float, rng: np.random.Generator) -> Image.Image:
    return _point(
        image, np.where(int(256 * x) > _VALUES, _VALUES, 255 - _VALUES)
    )  # from level 10 on nothing


def _solarize_add(image: Image.Image, x: float, rng: np.random.Generator) -> Image.Image:
    return _point(image, np.where(_VALUES < 128, _VALUES + int(110 * x), _VALUES))


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, x, rng: kind(image).enhance(1.8 * x + 0.1)


_VALUES = np.arange(256)
# In big_vision's order; each takes the picture and the level in units of 10.
OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, x, rng: ImageOps.autocontrast(image),
    "Equalize": lambda image, x, rng: ImageOps.equalize(image),
    "Invert": lambda image, x, rng: ImageOps.invert(image),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": lambda image, x, rng: _affine(image, 1, _signed(rng, 0.3 * x), 0, 0, 1, 0),
    "ShearY": lambda image, x, rng: _affine(image, 1, 0, 0, _signed(rng, 0.3 * x), 1, 0),
    "TranslateX": lambda image, x, rng: _affine(
        image, 1, 0, _signed(rng, _TRANSLATE * x) * image.width / _SIZE, 0, 1, 0
    ),
    "TranslateY": lambda image, x, rng: _affine(
        image, 1, 0, 0, 0, 1, _signed(rng, _TRANSLATE * x) * image.height / _SIZE
    ),
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}
_NAMES = tuple(OPERATIONS)


def rand_augment(
    image: Image.Image, layers: int, level: float, rng: np.random.Generator
) -> Image.Image:
    """``layers`` operations in turn, each drawn evenly from `OPERATIONS`, at ``level`` of 10."""
    for number in rng.integers(len(_NAMES), size=layers).tolist():
        image = OPERATIONS[_NAMES[number]](image, level / 10, rng)
    return image


def augment(
    image: Tensor, *, flip: bool, level: Augment, random_erasing: float, rng: np.random.Generator
) -> Tensor:
    """uint8 [C, S, S] -> uint8 [C, S, S], at random by ``rng`` alone.

    In this order: ``flip`` left to right, one time in two; ``level``'s RandAugment, or TrivialAugment (torchvision's);
    a rectangle of noise with probability ``random_erasing`` (torchvision's). The caller's global torch generator is
    left as it was.
    """
    if flip and rng.random() < 0.5:
        image = image.flip(-1)
    if level == "trivial":
        from torchvision.transforms import (
            TrivialAugmentWide,
        )  # slow to import, and only needed here

        with _torch_generator(rng):
            image = _tensor(TrivialAugmentWide()(_picture(image)))
    elif (layers := AUGMENT_LEVELS[level].layers) > 0:
        image = _tensor(rand_augment(_picture(image), layers, AUGMENT_LEVELS[level].magnitude, rng))
    if random_erasing and rng.random() < random_erasing:
        from torchvision.transforms import RandomErasing

        with _torch_generator(rng):
            top, left, height, width, _ = RandomErasing.get_params(
                image, (0.02, 0.33), (0.3, 3.3), [0.0]
            )
        image = image.clone()
        noise = rng.integers(256, size=(len(image), height, width), dtype=np.uint8)
        image[:, top : top + height, left : left + width] = torch.from_numpy(noise)
    return image


class _torch_generator:
    """torchvision's transforms draw from torch's global generator: here it is seeded by ours, and then put back."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._seed = int(rng.integers(2**63))

    def __enter__(self) -> None:
        self._before = torch.get_rng_state()
        torch.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._before)


def _picture(image: Tensor) -> Image.Image:
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels if len(image) == 3 else pixels[..., 0])


def _tensor(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(picture))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]
