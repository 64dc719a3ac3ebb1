"""From decoded pixels to the model's input. Images stay uint8 up to the device: a quarter of fp32's traffic.

Boxes of crops are drawn in whole pixels of the full picture and cut there, as torchvision and big_vision do it: no box
is rounded, for nothing is decoded at another scale. (A picture scaled down first would need a box of fractions: rounded
to whole pixels it costs 31 dB.)
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from prelora_ds.config.data import Crop
from prelora_ds.data.decode import Pixels

_AREA = (0.05, 1.0)
_RATIO = (3 / 4, 4 / 3)
_LONGEST = 100  # times the short side


def train_crop(pixels: Pixels, *, image_size: int, crop: Crop, rng: np.random.Generator) -> Tensor:
    """uint8 [H, W, C] -> uint8 [C, image_size, image_size], at random by ``rng`` alone.

    ``inception``: 5-100 % of the area, ratio 3/4 to 4/3, resized (Szegedy et al. 2015). ``pad``: an eighth of the size
    (at least a pixel) of black around, and a crop of the size out of that. ``none``: as it is.
    """
    if crop == "inception":
        top, left, height, width = inception_box(pixels.shape[0], pixels.shape[1], rng)
        pixels = pixels[top : top + height, left : left + width]
    image = resize(_planes(pixels), image_size, image_size)
    if crop == "pad":
        margin = max(1, image_size // 8)
        top, left = rng.integers(2 * margin + 1, size=2).tolist()
        image = functional.pad(image, (margin,) * 4)[
            :, top : top + image_size, left : left + image_size
        ]
    return image


def eval_transform(pixels: Pixels, *, image_size: int, crop: Crop) -> Tensor:
    """uint8 [H, W, C] -> uint8 [C, image_size, image_size], without chance.

    Where training takes ``inception`` crops: the short side to 256/224 of the size, and the centre. Else a resize.
    """
    image = _planes(pixels)
    if crop != "inception":
        return resize(image, image_size, image_size)
    short, (height, width) = round(image_size * 256 / 224), image.shape[-2:]
    # The resize of a strip of 1 x 60,000 pixels would ask for 12 GB, and only its centre is seen.
    height, width = min(height, _LONGEST * width), min(width, _LONGEST * height)
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    image = image[:, top : top + height, left : left + width]
    image = resize(image, short * height // min(height, width), short * width // min(height, width))
    top, left = round((image.shape[-2] - image_size) / 2), round((image.shape[-1] - image_size) / 2)
    return image[:, top : top + image_size, left : left + image_size]


def to_float(batch: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B, C, S, S] -> ``dtype`` in [-1, 1], on the batch's device. Rounded once, at the end."""
    return batch.to(torch.float32).div_(127.5).sub_(1.0).to(dtype)


def inception_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels; after ten boxes that do not fit, the largest one in the centre."""
    for area, ratio, down, right in rng.random((10, 4)).tolist():
        area = height * width * (_AREA[0] + area * (_AREA[1] - _AREA[0]))
        ratio = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** ratio  # uniform in the logarithm
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    h, w = (
        min(height, max(1, round(width / _RATIO[0]))),
        min(width, max(1, round(height * _RATIO[1]))),
    )
    return (height - h) // 2, (width - w) // 2, h, w


def _planes(pixels: Pixels) -> Tensor:
    """A view [C, H, W]; torch resizes pixels of three interleaved channels faster than planes."""
    if not pixels.flags.writeable:
        pixels = (
            pixels.copy()
        )  # Pillow's; torch warns of a tensor over memory that it may not write
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[-2:] == (height, width):
        return image
    return functional.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
