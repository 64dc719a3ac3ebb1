"""From the bytes of an image to the model's input. Images stay uint8 up to the device: a quarter of fp32's traffic."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_image

from prelora_ds.core.errors import ConfigError

Crop = Literal["inception", "pad", "none"]

_AREA = (0.05, 1.0)
_RATIO = (3 / 4, 4 / 3)
_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


def decode(data: bytearray, num_channels: int) -> Tensor:
    """JPEG or PNG bytes -> uint8 [num_channels, H, W]; grey becomes RGB and RGB grey where the two differ.

    Raises RuntimeError for bytes that are no such image, ConfigError for other than 1 or 3 channels.
    """
    if num_channels not in _MODES:
        raise ConfigError("model.num_channels", num_channels, "images are decoded to grey or RGB", "use 1 or 3")
    image: Tensor = decode_image(torch.frombuffer(data, dtype=torch.uint8), mode=_MODES[num_channels])
    if len(image) != num_channels:  # torchvision reads WebP and GIF too, and leaves their channels
        raise RuntimeError(f"decoded to {len(image)} channels, not {num_channels}")
    if image.dtype == torch.uint16:  # a PNG of 16 bits a channel
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image


def train_transform(image: Tensor, *, image_size: int, crop: Crop, flip: bool, generator: torch.Generator) -> Tensor:
    """uint8 [C, H, W] -> uint8 [C, image_size, image_size], at random by ``generator`` alone.

    ``inception``: 5-100 % of the area, ratio 3/4 to 4/3, resized (Szegedy et al. 2015). ``pad``: an eighth of the size
    (at least a pixel) of black around, and a crop of the size out of that. ``none``: as it is. ``flip``: mirrored left
    to right, one time in two.
    """
    if crop == "inception":
        top, left, height, width = _inception_box(image.shape[-2], image.shape[-1], generator)
        image = _resize(image[:, top:top + height, left:left + width], image_size, image_size)
    else:
        image = _resize(image, image_size, image_size)
    if crop == "pad":
        margin = max(1, image_size // 8)
        top, left = torch.randint(2 * margin + 1, (2,), generator=generator).tolist()
        image = functional.pad(image, (margin,) * 4)[:, top:top + image_size, left:left + image_size]
    if flip and torch.rand((), generator=generator) < 0.5:
        image = image.flip(-1)
    return image.contiguous()


def eval_transform(image: Tensor, *, image_size: int, crop: Crop) -> Tensor:
    """uint8 [C, H, W] -> uint8 [C, image_size, image_size], without chance.

    Where training takes ``inception`` crops: the short side to 256/224 of the size, and the centre. Else a resize.
    """
    if crop != "inception":
        return _resize(image, image_size, image_size).contiguous()
    short, (height, width) = round(image_size * 256 / 224), image.shape[-2:]
    image = _resize(image, short * height // min(height, width), short * width // min(height, width))
    top, left = round((image.shape[-2] - image_size) / 2), round((image.shape[-1] - image_size) / 2)
    return image[:, top:top + image_size, left:left + image_size].contiguous()


def to_float(batch: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B, C, S, S] -> ``dtype`` in [-1, 1], on the batch's device. Rounded once, at the end."""
    return batch.to(torch.float32).div_(127.5).sub_(1.0).to(dtype)


def _inception_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels; after ten boxes that do not fit, the largest one in the centre."""
    for _ in range(10):
        area, ratio, down, right = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = height * width * (_AREA[0] + area * (_AREA[1] - _AREA[0]))
        ratio = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** ratio  # uniform in the logarithm
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    h, w = min(height, max(1, round(width / _RATIO[0]))), min(width, max(1, round(height * _RATIO[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[-2:] == (height, width):
        return image
    return functional.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
