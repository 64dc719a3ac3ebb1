"""Decoding an image: from its bytes to its pixels."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from prelora_ds.errors import ConfigError

Pixels = NDArray[np.uint8]  # [H, W, C]

# Pillow, with which `prelora shards build` checks images, calls more pixels a decompression bomb.
# Headers are read before memory is allocated: a file of 1 kB can claim 65,376 x 65,408 pixels.
MAX_PIXELS = 178_956_970
_FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG = b"\xff\xd8"


class UndecodableError(ValueError):
    """The bytes are not a complete image in a known format of at most MAX_PIXELS."""


def decode(data: bytes | bytearray, num_channels: int) -> Pixels:
    """Decode the bytes of a JPEG, PNG or WebP to uint8 [H, W, num_channels].

    Grey is converted to RGB, or RGB to grey, to match ``num_channels``. simplejpeg (libjpeg-turbo)
    decodes every JPEG that it can decode without a warning; Pillow decodes the rest: CMYK, other
    formats, and images with an irregularity that loses no pixel.

    Raises UndecodableError, and ConfigError if ``num_channels`` is neither 1 nor 3.
    """
    if num_channels not in (1, 3):
        raise ConfigError(
            "model.num_channels", num_channels, "images are decoded to grey or RGB", "use 1 or 3"
        )
    if data[:2] == _JPEG:
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            _check_size(width, height)
            pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB" if num_channels == 3 else "GRAY")
            return pixels
        except UndecodableError:
            raise
        except ValueError:
            pass  # fall through to Pillow
    elif size := _webp_size(data):
        _check_size(*size)  # Pillow allocates the canvas before it checks the size
    try:
        return _decode_with_pillow(data, num_channels)
    except UnidentifiedImageError as error:
        raise UndecodableError(
            f"the bytes are not {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise anything for a damaged file
        raise UndecodableError(str(error) or type(error).__name__) from error


def _decode_with_pillow(data: bytes | bytearray, num_channels: int) -> Pixels:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_size(*image.size)
        plain: Image.Image = image
        # A PNG of 16 bits per channel, which Pillow's own conversion would clip.
        if image.mode.startswith("I"):
            plain = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        pixels = np.asarray(plain.convert("RGB" if num_channels == 3 else "L"))
    return pixels if num_channels == 3 else pixels[..., None]


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UndecodableError(
            f"its header claims {width} x {height} pixels, and at most {MAX_PIXELS:,} are decoded"
        )


def _webp_size(data: bytes | bytearray) -> tuple[int, int] | None:
    """Return (width, height) in the first chunk of a WebP file; None for anything else."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width = int.from_bytes(data[26:28], "little") & 0x3FFF
        height = int.from_bytes(data[28:30], "little") & 0x3FFF
        return width, height
    return None
