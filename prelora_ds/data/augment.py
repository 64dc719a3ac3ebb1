"""RandAugment as in Steiner et al. ("How to train your ViT?", 2022), TrivialAugment, RandomErasing.

Levels are tenths of each operation's range, so 15 means 1.5 times the range, as in big_vision's
autoaugment.py. torchvision spreads its levels over 31 bins instead (its 15 is half the range, and
mirrored), and timm reduces 15 to 10. The operations are Pillow's: on interleaved uint8 they take a
third of the time of torchvision's on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from prelora_ds.config.data import AUGMENT_LEVELS, Augment

_GREY = 128  # fills what an operation moves in from outside
_CUTOUT = 40.0  # pixels at level 10, for an image of _SIZE
_TRANSLATE = 100.0  # likewise
_SIZE = 224

Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Map each output pixel (x, y) to the pixel nearest to (a x + b y + c, d x + e y + f)."""
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
    """Paint a grey square of side ``80 x`` pixels (at 224), centred anywhere."""
    half = round(int(x * _CUTOUT) * image.width / _SIZE)
    cx, cy = (rng.random(2) * image.size).astype(int).tolist()
    image = image.copy()
    image.paste((_GREY,) * len(image.getbands()), (cx - half, cy - half, cx + half, cy + half))
    return image


def _point(image: Image.Image, table: np.ndarray) -> Image.Image:
    return image.point(np.clip(table, 0, 255).astype(np.uint8).tolist() * len(image.getbands()))


def _posterize(image: Image.Image, x: float, rng: np.random.Generator) -> Image.Image:
    bits = min(8, int(4 * x))  # weaker with the level: 10 keeps 4 bits, 20 all 8
    return _point(image, _VALUES >> (8 - bits) << (8 - bits))


def _solarize(image: Image.Image, x: float, rng: np.random.Generator) -> Image.Image:
    # No effect from level 10 upwards.
    return _point(image, np.where(int(256 * x) > _VALUES, _VALUES, 255 - _VALUES))


def _solarize_add(image: Image.Image, x: float, rng: np.random.Generator) -> Image.Image:
    return _point(image, np.where(_VALUES < 128, _VALUES + int(110 * x), _VALUES))


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, x, rng: kind(image).enhance(1.8 * x + 0.1)


_VALUES = np.arange(256)
# In big_vision's order; the arguments are the image, level / 10 and the generator.
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
    """Apply ``layers`` operations in turn at ``level``, each drawn uniformly from `OPERATIONS`."""
    for number in rng.integers(len(_NAMES), size=layers).tolist():
        image = OPERATIONS[_NAMES[number]](image, level / 10, rng)
    return image


def augment(
    image: Tensor, *, flip: bool, level: Augment, random_erasing: float, rng: np.random.Generator
) -> Tensor:
    """Augment uint8 [C, S, S] to uint8 [C, S, S]; all randomness comes from ``rng``.

    In this order: with ``flip``, a flip left to right with probability 1/2; the RandAugment of
    ``level``, or torchvision's TrivialAugment; with probability ``random_erasing``, a rectangle of
    noise (torchvision's). torch's global generator has the same state afterwards as before.
    """
    if flip and rng.random() < 0.5:
        image = image.flip(-1)
    if level == "trivial":
        from torchvision.transforms import TrivialAugmentWide  # slow to import

        with _torch_generator(rng):
            image = _from_pillow(TrivialAugmentWide()(_to_pillow(image)))
    elif (layers := AUGMENT_LEVELS[level].layers) > 0:
        magnitude = AUGMENT_LEVELS[level].magnitude
        image = _from_pillow(rand_augment(_to_pillow(image), layers, magnitude, rng))
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
    """A context that seeds torch's global generator from ``rng``, and restores it at the end.

    torchvision's transforms draw from that generator.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._seed = int(rng.integers(2**63))

    def __enter__(self) -> None:
        self._before = torch.get_rng_state()
        torch.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._before)


def _to_pillow(image: Tensor) -> Image.Image:
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels if len(image) == 3 else pixels[..., 0])


def _from_pillow(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]
