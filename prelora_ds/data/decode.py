"""From the bytes of a picture to its pixels."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from prelora_ds.core.errors import ConfigError

Pixels = NDArray[np.uint8]  # [H, W, C]

_FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG = b"\xff\xd8"


class UndecodableError(ValueError):
    """Bytes that are no whole picture in a known format."""


def decode(data: bytes | bytearray, num_channels: int) -> Pixels:
    """JPEG, PNG or WebP bytes -> uint8 [H, W, num_channels]; grey becomes RGB and RGB grey where the two differ.

    simplejpeg (libjpeg-turbo) reads what it can without a warning, Pillow all else: CMYK, other formats, pictures with
    an oddity that loses no pixel. Raises UndecodableError, and ConfigError for other than 1 or 3 channels.
    """
    if num_channels not in (1, 3):
        raise ConfigError("model.num_channels", num_channels, "images are decoded to grey or RGB", "use 1 or 3")
    if data[:2] == _JPEG:
        try:
            return simplejpeg.decode_jpeg(data, "RGB" if num_channels == 3 else "GRAY")  # type: ignore[no-any-return]
        except ValueError:
            pass  # Pillow has the last word
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            plain: Image.Image = image
            if image.mode.startswith("I"):  # a PNG of 16 bits a channel, which Pillow's own conversion would clip
                plain = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            pixels = np.asarray(plain.convert("RGB" if num_channels == 3 else "L"))
    except UnidentifiedImageError as error:
        raise UndecodableError(f"neither of {', '.join(_FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UndecodableError(str(error)) from error
    return pixels if num_channels == 3 else pixels[..., None]
