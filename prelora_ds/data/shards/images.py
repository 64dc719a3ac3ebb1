"""Encoded images on their way into a shard: looked through, and made smaller where that is asked for."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from prelora_ds.data.shards.reading import describe

if TYPE_CHECKING:
    from PIL.TiffImagePlugin import TiffImageFile

# Where Pillow itself refuses to decode. A header of a few bytes can claim any size.
MAX_PIXELS = 178_956_970
_MAX_JPEG_SIDE = 65_500
# No other plug-in of Pillow is let near the bytes: that for EPS, for one, runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "JPEG2000", "AVIF")
# What the loader decodes. An MPO, of some cameras, is a JPEG with further pictures after it.
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA")
_TO = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}
_GREY = ("1", "L", "LA", "La")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


class UnreadableImageError(ValueError):
    """Bytes that are not a whole image."""


def prepare(data: bytes, *, resize_short: int | None, quality: int) -> tuple[bytes, str]:
    """(bytes, extension) of an image for a shard. Raises UnreadableImageError for one that cannot be decoded.

    Without ``resize_short``, or when the short side has no more pixels than that, JPEG, PNG and WebP keep their bytes;
    other formats become PNG, pixel by pixel. Else the short side becomes ``resize_short`` (bicubic, antialiased), and
    the image a JPEG of ``quality``, grey or RGB. In both, 16 bits per channel are scaled to 8, and
    pixels of 32 bits are refused. The extension tells the format of the bytes, not that of the
    name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of images below the limit
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
        raise UnreadableImageError(f"not a whole image ({describe(error)})") from error


def _prepare(data: bytes, resize_short: int | None, quality: int) -> tuple[bytes, str]:
    opened = Image.open(io.BytesIO(data), formats=_FORMATS)
    form, short = opened.format or "", min(opened.size)
    if opened.width * opened.height > MAX_PIXELS:
        raise UnreadableImageError(
            f"an image of {opened.width} x {opened.height}, beyond the limit of {MAX_PIXELS:,} "
            "pixels"
        )
    smaller = resize_short is not None and short > resize_short
    if form in _KEPT and not smaller:
        # Every byte is decoded, for a file cut short, but at an eighth of the size: 4 times faster
        # for JPEG.
        opened.draft(opened.mode, (max(1, opened.width // 8), max(1, opened.height // 8)))
        opened.load()
        return data, _KEPT[form]
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
            f"and a side of a JPEG has at most {_MAX_JPEG_SIDE:,} pixels"
        )
    return encode(image.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=quality), "jpg"


def eight_bit(image: Image.Image) -> Image.Image:
    """``image``, as Pillow opened it, in a mode that PNG has, with 8 bits per channel or fewer.

    Pillow's own conversion from 16 bits clips, so that all that is brighter than 255 becomes white.
    Raises UnreadableImageError for modes I and F (32 bits per pixel): no file tells which of their
    values is white.
    """
    mode = image.mode
    if mode in _IN_PNG:
        return image
    # A PGM of more than 8 bits is opened in mode I, with its values brought to 16 bits.
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        tags = cast("TiffImageFile", image).tag_v2 if image.format == "TIFF" else {}
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        pixels = np.asarray(image).astype(np.uint16) >> (bits - 8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            pixels = 255 - pixels
        return Image.fromarray(pixels.astype(np.uint8))
    if mode in ("I", "F"):
        kind = "whole numbers" if mode == "I" else "floating-point numbers"
        raise UnreadableImageError(
            f"its pixels are {kind} of 32 bits (Pillow's mode {mode}), and nothing tells which "
            "of them is white; convert it to 8 or 16 bits per channel"
        )
    return image.convert(_TO.get(mode, "RGB"))


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
