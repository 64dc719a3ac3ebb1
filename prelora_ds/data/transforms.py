"""Transforms from decoded pixels to the model's input.

Images stay uint8 up to the device, which is a quarter of the traffic of fp32.

Crop boxes are drawn in whole pixels of the full image and cut there, as in torchvision and
big_vision: no box is rounded, since images are always decoded at full scale. (An image that is
scaled down first would need a fractional box; rounding it to whole pixels costs 31 dB.)
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
_LONGEST = 100  # the longest side that is resized, in multiples of the short side


def train_crop(pixels: Pixels, *, image_size: int, crop: Crop, rng: np.random.Generator) -> Tensor:
    """Crop uint8 [H, W, C] to uint8 [C, image_size, image_size]; randomness comes from ``rng``.

    crop:

    - ``inception``: a box of 5-100 % of the area with a ratio of 3/4 to 4/3, resized (Szegedy et
      al. 2015);
    - ``pad``: the image is resized and padded with black on each side, by an eighth of its size
      and at least one pixel, and a box of the size is cut out of that;
    - ``none``: the image is resized.
    """
    if crop == "inception":
        top, left, height, width = inception_box(pixels.shape[0], pixels.shape[1], rng)
        pixels = pixels[top : top + height, left : left + width]
    image = resize(_channels_first(pixels), image_size, image_size)
    if crop == "pad":
        margin = max(1, image_size // 8)
        top, left = rng.integers(2 * margin + 1, size=2).tolist()
        image = functional.pad(image, (margin,) * 4)
        image = image[:, top : top + image_size, left : left + image_size]
    return image


def eval_transform(pixels: Pixels, *, image_size: int, crop: Crop) -> Tensor:
    """Transform uint8 [H, W, C] to uint8 [C, image_size, image_size] deterministically.

    If training uses ``inception`` crops, the short side is resized to 256/224 of the size and the
    centre is cut out; otherwise the image is resized.
    """
    image = _channels_first(pixels)
    if crop != "inception":
        return resize(image, image_size, image_size)
    short = eval_short_side(image_size)
    height, width = image.shape[-2:]
    # Resizing a strip of 1 x 60,000 pixels would need 12 GB, and only its centre is used.
    height, width = min(height, _LONGEST * width), min(width, _LONGEST * height)
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    image = image[:, top : top + height, left : left + width]
    image = resize(image, short * height // min(height, width), short * width // min(height, width))
    top, left = round((image.shape[-2] - image_size) / 2), round((image.shape[-1] - image_size) / 2)
    return image[:, top : top + image_size, left : left + image_size]


def eval_short_side(image_size: int) -> int:
    """Return the length of the short side from which `eval_transform` cuts out the centre."""
    return round(image_size * 256 / 224)


def to_float(batch: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert uint8 [B, C, S, S] to ``dtype`` in [-1, 1] on its device, with one rounding."""
    return batch.to(torch.float32).div_(127.5).sub_(1.0).to(dtype)


def inception_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a crop box: (top, left, height, width) in pixels.

    After ten boxes that do not fit, it is the largest allowed box in the centre.
    """
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


def _channels_first(pixels: Pixels) -> Tensor:
    """Return a view [C, H, W] of [H, W, C].

    The memory stays interleaved: torch resizes three interleaved channels faster than planes.
    """
    if not pixels.flags.writeable:
        pixels = pixels.copy()  # from Pillow; torch warns about tensors over read-only memory
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize [C, H, W] bilinearly with antialiasing; an image of this size is returned as it is."""
    if image.shape[-2:] == (height, width):
        return image
    return functional.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
