"""Pixels: what a decoder, a crop and a resize make of a picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from support.memory import small_memory

from prelora_ds.data.datasets import rng_for
from prelora_ds.data.decode import UndecodableError, decode
from prelora_ds.data.transforms import eval_transform, to_float, train_crop
from prelora_ds.errors import ConfigError


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(height: int = 10, width: int = 12, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 1), ("RGBA", 3), ("P", 3), ("1", 1), ("CMYK", 3)])
def test_other_channel_counts_are_converted(mode, channels):
    image = Image.new("RGB", (12, 10), (200, 30, 90)).convert(mode)
    pixels = decode(encode(image, "JPEG" if mode == "CMYK" else "PNG"), channels)
    expected = np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(10, 12, channels)
    assert pixels.shape == (10, 12, channels) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 100}])
def test_a_jpeg_is_decoded_to_the_pixels_that_pillow_sees(channels, options):
    data = encode(picture(75, 91), "JPEG", **options)
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB" if channels == 3 else "L", None)
        np.testing.assert_array_equal(decode(data, channels).squeeze(), np.asarray(image))


def test_a_png_of_16_bits_keeps_its_high_byte_and_webp_is_read():
    deep = Image.fromarray(np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4))
    assert decode(encode(deep, "PNG"), 1).flatten().tolist() == list(range(0, 256, 16))
    np.testing.assert_array_equal(decode(encode(picture(), "WEBP", lossless=True), 3), np.asarray(picture()))


def test_a_jpeg_with_rubbish_after_its_end_loses_nothing_and_one_cut_short_is_refused():
    whole = encode(picture(64, 64), "JPEG")
    np.testing.assert_array_equal(decode(whole + b"rubbish" * 9, 3), decode(whole, 3))
    with pytest.raises(UndecodableError, match="truncated"):
        decode(whole[:len(whole) // 2], 3)


@pytest.mark.parametrize("data", [b"", b"no picture", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(50),
                                  b"\x80\x04cposix\nsystem\n."])
def test_what_is_not_an_image_is_refused(data):
    with pytest.raises(UndecodableError):
        decode(data, 3)


def test_two_channels_are_refused():
    with pytest.raises(ConfigError, match=r"model\.num_channels = 2"):
        decode(encode(picture(), "PNG"), 2)


def test_the_inception_crop_stays_within_5_to_100_per_cent_and_its_ratios():
    """On a picture whose pixels are their own coordinates, a crop tells its box."""
    height, width, size = 200, 240, 224
    grid = np.stack(np.broadcast_arrays(np.arange(height)[:, None], np.arange(width), 0), axis=-1).astype(np.uint8)
    shares = []
    for seed in range(400):
        crop = train_crop(grid, image_size=size, crop="inception", rng=rng_for(seed)).int()
        rows, columns = crop[0, :, 0], crop[1, 0]
        h, w = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        shares.append(h * w / (height * width))
        assert 0.68 < w / h < 1.47  # 3/4 to 4/3, with the rounding of the box and of the resize
    assert 0.04 < min(shares) < 0.08 and 0.9 < max(shares) <= 1.0
    assert 0.4 < np.mean(shares) < 0.55  # uniform in 0.05..1, the largest fitting less often


def test_a_crop_is_resized_as_torchvision_does_it():
    from torchvision.transforms.v2.functional import resized_crop

    pixels = np.array(picture(90, 120))
    crop = train_crop(pixels, image_size=32, crop="inception", rng=rng_for(1))
    from prelora_ds.data.transforms import inception_box

    top, left, height, width = inception_box(90, 120, rng_for(1))
    image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    expected = resized_crop(image, top, left, height, width, [32, 32], antialias=True)
    assert (crop.int() - expected.int()).abs().max() <= 1  # interleaved and planar kernels round differently


def test_the_pad_crop_moves_the_picture_by_at_most_the_margin():
    pixels = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
    padded = np.pad(pixels[..., 0], 1)
    windows = {tuple(padded[top:top + 8, left:left + 8].flatten().tolist()) for top in range(3) for left in range(3)}
    seen = {tuple(train_crop(pixels, image_size=8, crop="pad", rng=rng_for(seed)).flatten().tolist())
            for seed in range(200)}
    assert seen == windows


def test_none_and_the_plain_evaluation_leave_a_picture_of_the_size_as_it_is():
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    plain = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(train_crop(pixels, image_size=8, crop="none", rng=rng_for(0)), plain)
    assert torch.equal(eval_transform(pixels, image_size=8, crop="pad"), plain)
    assert eval_transform(pixels, image_size=4, crop="none").shape == (1, 4, 4)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (73, 73), (64, 64), (30, 500)])
def test_evaluation_resizes_and_crops_as_torchvision_does(height, width):
    from torchvision.transforms.v2.functional import center_crop, resize

    pixels = np.array(picture(height, width))
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = center_crop(resize(image, [73], antialias=True), [64, 64])
    assert torch.equal(eval_transform(pixels, image_size=64, crop="inception"), expected)


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (2, 65_000)])
def test_a_strip_is_evaluated_and_trained_on_with_little_memory(shape):
    pixels = np.arange(np.prod(shape)).reshape(*shape, 1).astype(np.uint8).repeat(3, axis=2)
    with small_memory():
        for crop in ("inception", "pad", "none"):
            evaluated = eval_transform(pixels, image_size=224, crop=crop)
            trained = train_crop(pixels, image_size=224, crop=crop, rng=rng_for(1))
            assert evaluated.shape == trained.shape == (3, 224, 224)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_float_maps_bytes_to_minus_one_to_one_rounded_once(dtype):
    values = torch.arange(256, dtype=torch.uint8)
    expected = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)
    result = to_float(values, dtype)
    assert result.dtype == dtype and (result[0], result[255]) == (-1, 1)
    assert (result.double() - expected).abs().max() <= torch.finfo(dtype).eps / 2
