"""Checking encoded images before they go into a shard, and resizing them on request."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from prelora_ds.data.shards.reading import describe

if TYPE_CHECKING:
    from PIL.TiffImagePlugin import TiffImageFile

# The limit beyond which Pillow refuses to decode. A header of a few bytes can claim any size.
MAX_PIXELS = 178_956_970
_MAX_JPEG_SIDE = 65_500
# No other Pillow plug-in reads the bytes: the one for EPS, for example, runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "JPEG2000", "AVIF")
# What the loader decodes. An MPO, from some cameras, is a JPEG followed by further images.
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA")
_TO = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}
_GREY = ("1", "L", "LA", "La")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


class UnreadableImageError(ValueError):
    """The bytes are not a complete image."""


def prepare(data: bytes, *, resize_short: int | None, quality: int) -> tuple[bytes, str]:
    """Return (bytes, extension) of an image for a shard.

    Without ``resize_short``, or if the short side is not longer than that, JPEG, PNG and WebP keep
    their bytes, and other formats become PNGs with the same pixels. Otherwise the image is resized
    to a short side of ``resize_short`` (bicubic, antialiased) and becomes a JPEG of ``quality``,
    grey or RGB. In both cases 16 bits per channel are scaled to 8, and pixels of 32 bits are
    refused. The extension is that of the format of the bytes, whatever the file name says.

    Raises UnreadableImageError for an image that cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, and about images below the limit
            return _prepare(data, resize_short, quality)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        problem = (
            f"it begins with {data[:12]!r}, which is in none of {', '.join(_FORMATS)}"
            if data
            else "it is empty"
        )
        raise UnreadableImageError(f"not an image ({problem})") from error
    except Exception as error:  # Pillow's decoders raise anything at damaged or hostile bytes
        raise UnreadableImageError(f"not a complete image ({describe(error)})") from error


def _prepare(data: bytes, resize_short: int | None, quality: int) -> tuple[bytes, str]:
    opened = Image.open(io.BytesIO(data), formats=_FORMATS)
    image_format = opened.format or ""
    short = min(opened.size)
    if opened.width * opened.height > MAX_PIXELS:
        raise UnreadableImageError(
            f"an image of {opened.width} x {opened.height} exceeds the limit of {MAX_PIXELS:,} "
            "pixels"
        )
    smaller = resize_short is not None and short > resize_short
    if image_format in _KEPT and not smaller:
        # Decode every byte to find truncated files, at an eighth of the size: 4 times faster for
        # JPEG.
        opened.draft(opened.mode, (max(1, opened.width // 8), max(1, opened.height // 8)))
        opened.load()
        return data, _KEPT[image_format]
    opened.load()
    image = eight_bit(opened)
    if not smaller:
        return encode(image, "PNG"), "png"
    assert resize_short is not None
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode in _GREY else "RGB")
    size = resize_short * image.width // short, resize_short * image.height // short
    if max(size) > _MAX_JPEG_SIDE:
        raise UnreadableImageError(
            f"an image of {image.width} x {image.height} would become {size[0]} x {size[1]}, "
            f"and a JPEG has at most {_MAX_JPEG_SIDE:,} pixels per side"
        )
    return encode(image.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=quality), "jpg"


def eight_bit(image: Image.Image) -> Image.Image:
    """Convert ``image``, as Pillow opened it, to a PNG mode with at most 8 bits per channel.

    Pillow's own conversion from 16 bits clips: everything above 255 becomes white. Raises
    UnreadableImageError for the modes I and F (32 bits per pixel), because no file states which
    of their values is white.
    """
    mode = image.mode
    if mode in _IN_PNG:
        return image
    # Pillow opens a PGM of more than 8 bits in mode I, with its values scaled to 16 bits.
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        tags = cast("TiffImageFile", image).tag_v2 if image.format == "TIFF" else {}
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        pixels = np.asarray(image).astype(np.uint16) >> (bits - 8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            pixels = 255 - pixels
        return Image.fromarray(pixels.astype(np.uint8))
    if mode in ("I", "F"):
        kind = "integers" if mode == "I" else "floating-point numbers"
        raise UnreadableImageError(
            f"its pixels are {kind} of 32 bits (Pillow's mode {mode}), and no file states which "
            "of them is white; convert it to 8 or 16 bits per channel"
        )
    return image.convert(_TO.get(mode, "RGB"))


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """Return the bytes of ``image`` in ``image_format``; ``options`` are Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()
