"""RandAugment on big_vision's scale, and chance that comes from one generator alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from prelora_ds.config.data import AUGMENT_LEVELS
from prelora_ds.data.augment import OPERATIONS, augment, rand_augment
from prelora_ds.data.datasets import rng_for

SIZE = 224


def gradient(size: int = SIZE) -> Image.Image:
    """Red counts the columns, green the rows."""
    rows, columns = np.indices((size, size))
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 77)], -1).astype(np.uint8))


def apply(name: str, level: float, image: Image.Image | None = None, seed: int = 0) -> np.ndarray:
    return np.asarray(OPERATIONS[name](image or gradient(), level / 10, rng_for(seed))).astype(int)


def flat(*values: int) -> Image.Image:
    return Image.fromarray(np.broadcast_to(np.array(values, np.uint8)[:, None, None], (len(values), 8, 3)).copy())


@pytest.mark.parametrize(("level", "pixels"), [(0, 0), (5, 50), (10, 100), (15, 150), (20, 200)])
@pytest.mark.parametrize(("name", "axis"), [("TranslateX", 1), ("TranslateY", 0)])
def test_translations_are_ten_pixels_a_level(name, axis, level, pixels):
    seen = set()
    for seed in range(20):
        moved = np.moveaxis(apply(name, level, seed=seed)[..., 1 - axis], axis, 0)  # along the axis, its coordinate
        seen |= {int(value) - place for place, value in enumerate(moved[:, 0]) if value != 128}
        grey = (moved[:, 0] == 128).sum()
        assert pixels <= grey <= pixels + 1  # and the column that is 128 by itself
    assert seen == {pixels, -pixels}


@pytest.mark.parametrize(("level", "degrees"), [(0, 0), (10, 30), (15, 45), (20, 60)])
def test_rotation_is_three_degrees_a_level(level, degrees):
    image = apply("Rotate", level)
    middle = SIZE // 2
    inner = image[middle - 40:middle + 40, middle - 40:middle + 40]
    along = (inner[:, -1, 0] - inner[:, 0, 0]).mean() / (inner.shape[1] - 1)  # the column it shows, a pixel right
    assert np.degrees(np.arccos(np.clip(along, -1, 1))) == pytest.approx(degrees, abs=1.0)


@pytest.mark.parametrize(("level", "slope"), [(0, 0.0), (10, 0.3), (15, 0.45)])
@pytest.mark.parametrize("name", ["ShearX", "ShearY"])
def test_a_shear_moves_by_three_hundredths_a_level_and_row(name, level, slope):
    image = apply(name, level)
    if name == "ShearY":
        image = image.transpose(1, 0, 2)[..., [1, 0, 2]]
    inner = image[:100, 90:130, 0] if slope else image[..., 0]
    shift = (inner[60] - inner[0]).mean() / 60
    assert abs(shift) == pytest.approx(slope, abs=0.02)


@pytest.mark.parametrize(("level", "bits"), [(5, 2), (10, 4), (15, 6), (20, 8)])
def test_posterize_keeps_four_bits_at_level_10_and_all_at_20(level, bits):
    values = flat(*range(256))
    assert apply("Posterize", level, values)[:, 0, 0].tolist() == [v >> (8 - bits) << (8 - bits) for v in range(256)]


@pytest.mark.parametrize(("level", "threshold"), [(0, 0), (5, 128), (10, 256), (15, 256)])
def test_solarize_turns_what_is_above_the_threshold(level, threshold):
    expected = [v if v < threshold else 255 - v for v in range(256)]
    assert apply("Solarize", level, flat(*range(256)))[:, 0, 0].tolist() == expected


@pytest.mark.parametrize(("level", "added"), [(0, 0), (10, 110), (15, 165)])
def test_solarize_add_lightens_the_dark_half(level, added):
    expected = [min(255, v + added) if v < 128 else v for v in range(256)]
    assert apply("SolarizeAdd", level, flat(*range(256)))[:, 0, 0].tolist() == expected


@pytest.mark.parametrize(("level", "factor"), [(0, 0.1), (5, 1.0), (10, 1.9), (15, 2.8)])
def test_enhancements_go_from_a_tenth_to_beyond(level, factor):
    values = np.arange(0, 256, 5)
    bright = apply("Brightness", level, flat(*values.tolist()))[:, 0, 0]
    assert np.abs(bright - np.clip(values * factor, 0, 255)).max() <= 1
    image = Image.fromarray(np.array([[[200, 100, 60]]], np.uint8))
    grey = np.asarray(image.convert("L")).astype(int)[0, 0]
    colour = apply("Color", level, image)[0, 0]
    assert np.abs(colour - np.clip(grey + factor * (np.array([200, 100, 60]) - grey), 0, 255)).max() <= 1


@pytest.mark.parametrize(("level", "side"), [(0, 0), (10, 80), (15, 120), (20, 160)])
def test_cutout_greys_a_square_of_eight_pixels_a_level(level, side):
    plain, most = Image.new("RGB", (SIZE, SIZE), (1, 2, 3)), 0
    for seed in range(60):
        cut = (apply("Cutout", level, plain, seed) == 128).all(-1)
        rows, columns = cut.any(1).sum(), cut.any(0).sum()
        assert max(rows, columns) <= side + 1 and (side == 0) == (not cut.any())
        most = max(most, min(rows, columns))
    assert side - 2 <= most <= side + 1


def test_sixteen_operations_come_evenly_and_level_15_is_stronger_than_10():
    assert len(OPERATIONS) == 16
    names, seen = list(OPERATIONS), dict.fromkeys(OPERATIONS, 0)
    for seed in range(1600):
        seen[names[int(rng_for(seed).integers(16, size=1)[0])]] += 1
    assert min(seen.values()) > 60 and max(seen.values()) < 140
    assert [tuple(AUGMENT_LEVELS[name]) for name in ("light1", "light2", "medium1", "medium2", "strong1", "strong2")] \
        == [(2, 0, 0.0), (2, 10, 0.2), (2, 15, 0.2), (2, 15, 0.5), (2, 20, 0.5), (2, 20, 0.8)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [
    {"level": "strong2"}, {"level": "trivial"}, {"level": "none", "random_erasing": 1.0},
    {"level": "medium2", "random_erasing": 0.5}, {"level": "light1"}])
def test_only_the_key_matters_and_the_global_generator_is_left_unchanged(options, channels):
    image = torch.randint(0, 256, (channels, 32, 32), dtype=torch.uint8)
    options = {"flip": True, "random_erasing": 0.0} | options
    before, kept = torch.get_rng_state(), image.clone()
    results = []
    for seed in range(12):
        first = augment(image, rng=rng_for(seed), **options)
        torch.rand(seed)
        assert torch.equal(first, augment(image, rng=rng_for(seed), **options))
        assert first.shape == image.shape and first.dtype == torch.uint8
        results.append(first.contiguous().numpy().tobytes())
    torch.set_rng_state(before)
    augment(image, rng=rng_for(0), **options)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(image, kept)
    assert len(set(results)) > 6


def test_random_erasing_hits_its_share_of_the_area_and_flip_half_of_the_pictures():
    image = torch.zeros((3, 64, 64), dtype=torch.uint8)
    areas = [(augment(image, flip=False, level="none", random_erasing=1.0, rng=rng_for(seed)) != 0).float().mean()
             for seed in range(100)]
    assert min(areas) > 0.015 and max(areas) < 0.34 and 0.1 < np.mean(areas) < 0.25
    sides = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    flipped = sum(int(augment(sides, flip=True, level="none", random_erasing=0.0, rng=rng_for(seed))[0, 0, 0]) == 63
                  for seed in range(400))
    assert 160 < flipped < 240


def test_no_layers_change_nothing():
    assert rand_augment(gradient(), 0, 15, rng_for(0)).tobytes() == gradient().tobytes()
