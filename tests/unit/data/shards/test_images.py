"""Every image becomes one that the loader decodes to the same picture, or is refused by name."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from prelora_ds.data.decode import decode
from prelora_ds.data.shards.images import MAX_PIXELS, UnreadableImageError, eight_bit, prepare

SIDE = 64
RAMP = np.tile(np.arange(SIDE, dtype=np.uint8) * 4, (SIDE, 1))
GREY = Image.fromarray(RAMP)
SIXTEEN = RAMP.astype(np.uint16) * 257  # 0 to 65,535 is black to white


def of_mode(mode):
    """The ramp from black to white in a mode of Pillow."""
    if mode.startswith("I;16"):
        order = ">u2" if mode == "I;16B" else "<u2"
        return Image.frombytes(mode, GREY.size, SIXTEEN.astype(order).tobytes())
    if mode in ("La", "RGBa", "PA"):
        return GREY.convert({"La": "LA", "RGBa": "RGBA", "PA": "P"}[mode]).convert(mode)
    if mode in ("HSV", "RGBX"):
        return GREY.convert("RGB").convert(mode)
    if mode == "LAB":
        neutral = Image.new("L", GREY.size, 128)
        return Image.merge("LAB", [GREY, neutral, neutral])
    return GREY.convert(mode)


def saved(image, form="TIFF", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def grey(data):
    return decode(data, 1)[..., 0].astype(int)


READ = ["L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I;16",
        "I;16B", "I;16L", "I;16N"]
IN_TIFF = [mode for mode in READ if mode not in ("La", "RGBa", "HSV", "I;16N")]


@pytest.mark.parametrize("mode", READ)
def test_every_mode_keeps_its_picture_in_eight_bits(mode):
    image = eight_bit(of_mode(mode))
    assert np.abs(grey(saved(image, "PNG")) - RAMP).max() <= 1


def test_lab_is_converted_by_its_lightness():
    image = np.asarray(eight_bit(of_mode("LAB")).convert("L")).astype(int)
    assert (np.diff(image[0]) >= 0).all() and image[0, 0] == 0
    assert abs(image[0, 32] - 119) <= 3  # L* = 50 is 119 in sRGB


def test_black_and_white_stays_black_and_white():
    image = eight_bit(of_mode("1"))
    assert set(np.unique(grey(saved(image, "PNG")))) == {0, 255}


@pytest.mark.parametrize("mode", IN_TIFF)
@pytest.mark.parametrize("short", [None, 32])
def test_a_tiff_of_every_mode_becomes_the_same_picture_with_and_without_resizing(mode, short):
    data, extension = prepare(saved(of_mode(mode)), resize_short=short, quality=95)
    assert extension == ("png" if short is None else "jpg")
    expected = RAMP if short is None else RAMP.reshape(32, 2, 32, 2).mean((1, 3))
    assert np.abs(grey(data) - expected).mean() < 2


@pytest.mark.parametrize("short", [None, 32])
@pytest.mark.parametrize(("mode", "form"), [("I", "TIFF"), ("F", "TIFF"), ("F", "PPM")])
def test_pixels_of_32_bits_are_refused_by_name_with_and_without_resizing(mode, form, short):
    image = Image.fromarray(RAMP.astype(np.int32 if mode == "I" else np.float32) * 1000)
    with pytest.raises(UnreadableImageError, match=rf"32 bits \(Pillow's mode {mode}\).*convert"):
        prepare(saved(image, form), resize_short=short, quality=90)


@pytest.mark.parametrize("white", [65_535, 1023, 255])
@pytest.mark.parametrize("short", [None, 32])
def test_a_pgm_is_scaled_from_its_own_white(white, short):
    pixels = np.rint(RAMP / 255 * white).astype(">u2" if white > 255 else np.uint8)
    pgm = b"P5 %d %d %d\n" % (SIDE, SIDE, white) + pixels.tobytes()
    data = prepare(pgm, resize_short=short, quality=95)[0]
    assert abs(grey(data).mean() - RAMP.mean()) < 2


def tiff(pixels, bits, photometric, width=SIDE):
    """A grey TIFF, written by hand: Pillow writes neither 12 bits nor 16 with white at zero."""
    tags = {256: width, 257: SIDE, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: SIDE,
            279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def test_a_tiff_of_12_bits_and_one_whose_zero_is_white():
    twelve = (RAMP.astype(np.int32) * 4095 // 255).reshape(-1, 2)
    first, second = twelve[:, 0], twelve[:, 1]
    triples = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    packed = np.stack(triples, 1).astype(np.uint8)
    for data in (tiff(packed.tobytes(), 12, 1), tiff((65_535 - SIXTEEN).tobytes(), 16, 0)):
        assert Image.open(io.BytesIO(data)).mode == "I;16"
        assert np.abs(grey(prepare(data, resize_short=None, quality=90)[0]) - RAMP).max() <= 1


def test_a_camera_file_of_several_pictures_keeps_its_bytes_as_a_jpeg():
    data = saved(GREY, "MPO", save_all=True, append_images=[GREY.rotate(90)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert prepare(data, resize_short=None, quality=90) == (data, "jpg")
    assert np.abs(grey(data) - RAMP).mean() < 3


def bmp_header(width, height):
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + \
        struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF"])
def test_a_header_that_claims_immense_sides_is_refused_before_memory_is_asked_for(form):
    if form == "JPEG":
        data = bytearray(saved(GREY, form))
        start = data.index(b"\xff\xc0") + 5
        data[start:start + 4] = struct.pack(">2H", 65_000, 65_000)
    elif form == "PNG":
        data = bytearray(saved(GREY, form))
        data[16:24] = struct.pack(">2I", 1 << 20, 1 << 20)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif form == "WEBP":
        data = bytearray(saved(GREY, form))
        data[26:30] = struct.pack("<2H", 16_383, 16_383)
    elif form == "BMP":
        data = bmp_header(1 << 20, 1 << 20)
    elif form == "PPM":
        data = b"P6 1000000 1000000 255\n"
    else:
        data = tiff(bytes(64), 8, 1, width=1 << 28)
    for short in (None, 32):
        with pytest.raises(UnreadableImageError, match=r"limit|exceeds"):
            prepare(bytes(data), resize_short=short, quality=90)


def test_the_limit_is_reported_without_a_warning_below_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImageError) as refused:
            prepare(bmp_header(10_000, 10_000), resize_short=None, quality=90)
    assert "limit" not in str(refused.value) and MAX_PIXELS > 10_000 ** 2


@pytest.mark.parametrize(("data", "problem"), [
    (b"", "not an image .it is empty"),
    (b"<html>404</html>", "not an image .it begins with b'<html>404"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image .it begins with b'%!PS"),
])
def test_what_is_not_an_image_is_reported_by_its_first_bytes(data, problem):
    """An EPS would be handed to Ghostscript, a program for the files of others to run in."""
    with pytest.raises(UnreadableImageError, match=problem) as refused:
        prepare(data, resize_short=None, quality=90)
    assert "BytesIO" not in str(refused.value)


def test_an_image_that_becomes_longer_than_a_jpeg_can_be_is_reported():
    long = saved(Image.new("L", (100_000, 40)), "PNG")
    assert prepare(long, resize_short=None, quality=90) == (long, "png")
    with pytest.raises(UnreadableImageError, match=r"100000 x 40 would become 75000 x 30"):
        prepare(long, resize_short=30, quality=90)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF"])
def test_mutated_images_are_read_or_refused_and_nothing_else(form):
    data, rng = saved(GREY.convert("RGB"), form), np.random.default_rng(0)
    for _ in range(60):
        mutated = bytearray(data)
        for place in rng.integers(0, min(len(data), 400), rng.integers(1, 6)):
            mutated[place] = rng.integers(0, 256)
        try:
            out, extension = prepare(bytes(mutated), resize_short=32, quality=90)
        except UnreadableImageError as error:
            assert "BytesIO" not in str(error)
        else:
            assert extension in ("jpg", "png", "webp") and len(out) > 0
