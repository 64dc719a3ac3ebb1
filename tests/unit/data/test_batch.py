"""Mixup and CutMix: pairs of the global order, whoever holds them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prelora_ds.data.batch import draw_mix, mix_images, mix_labels
from prelora_ds.data.datasets import ImagePipeline
from prelora_ds.data.loader import TrainLoader
from prelora_ds.data.shards.writer import write_shards
from prelora_ds.data.transforms import to_float
from prelora_ds.errors import ConfigError

SAMPLES, SIZE = 37, 16  # an odd number: pairs lie across epochs
PIPELINE = ImagePipeline(SIZE, 3, "inception", flip=True, augment="medium2", random_erasing=0.3, mixup=0.5, cutmix=1.0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    def picture(number: int) -> bytes:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG")
        return buffer.getvalue()

    return write_shards(((str(i), picture(i), "jpg", i) for i in range(SAMPLES)),
                        tmp_path_factory.mktemp("data") / "train", samples_per_shard=10,
                        class_names=list(map(str, range(SAMPLES))))


def inputs(manifest, *, world_size: int, micro: int, steps: int = 4, **options) -> list[tuple[torch.Tensor, ...]]:
    """What the model sees of each global batch: pixels in bf16, targets, labels."""
    parts = []
    for rank in range(world_size):
        loader = TrainLoader(manifest, PIPELINE, seed=3, global_batch_size=16, micro_batch_size=micro, rank=rank,
                             world_size=world_size, **{"workers": 0} | options)
        parts.append([[(mix_images(to_float(b.images, torch.float32), b.mix).to(torch.bfloat16),
                        mix_labels(b.labels, b.mix, SAMPLES), b.labels) for b in loader.next()] for _ in range(steps)])
        loader.close()
    return [tuple(map(torch.cat, zip(*(micro for rank in parts for micro in rank[step]), strict=True)))
            for step in range(steps)]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (1, 4), (2, 2), (2, 4), (2, 8), (4, 2), (4, 4)])
def test_pixels_and_targets_are_the_same_at_any_world_size_and_micro_batch(manifest, world_size, micro):
    whole, cut = inputs(manifest, world_size=1, micro=16), inputs(manifest, world_size=world_size, micro=micro)
    for one, other in zip(whole, cut, strict=True):
        assert all(map(torch.equal, one, other))
    assert len({t.shape for t, *_ in whole}) == 1 and not torch.equal(whole[0][0], whole[1][0])


def test_workers_and_a_later_start_mix_the_same(manifest):
    whole = inputs(manifest, world_size=1, micro=4)
    for one, other in zip(whole, inputs(manifest, world_size=1, micro=4, workers=2), strict=True):
        assert all(map(torch.equal, one, other))
    for one, other in zip(whole[2:], inputs(manifest, world_size=1, micro=4, steps=2, start_step=2), strict=True):
        assert all(map(torch.equal, one, other))


def test_a_micro_batch_that_would_cut_a_pair_is_refused(manifest):
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size = 1: is odd"):
        TrainLoader(manifest, PIPELINE, seed=0, global_batch_size=16, micro_batch_size=1, rank=0, world_size=1,
                    workers=0)
    loader = TrainLoader(manifest, PIPELINE, seed=0, global_batch_size=6, micro_batch_size=6, rank=0, world_size=1,
                         workers=0)
    with pytest.raises(ValueError, match="odd"):
        loader.rebatch(3)
    loader.close()


@given(alpha=st.sampled_from([0.2, 0.5, 0.8]), seed=st.integers(0, 2**32), first=st.integers(0, 10**9))
@settings(deadline=None, max_examples=30)
def test_mixup_by_hand(alpha, seed, first):
    mix = draw_mix(seed, np.zeros(4, np.int64), 2 * first, mixup=alpha, cutmix=0.0, size=8)
    share = mix[:, 0]
    assert ((share >= 0.5) & (share <= 1)).all() and torch.equal(mix[:, 1], share) and not mix[:, 2:].any()
    images = torch.rand((4, 1, 8, 8))
    mixed = mix_images(images, mix)
    for row, partner, pair in ((0, 1, 0), (1, 0, 0), (2, 3, 1), (3, 2, 1)):
        torch.testing.assert_close(mixed[row], share[pair] * images[row] + (1 - share[pair]) * images[partner])
    targets = mix_labels(torch.tensor([2, 0, 1, 1]), mix, 3)
    expected = [[1 - share[0], 0, share[0]], [share[0], 0, 1 - share[0]], [0, 1, 0], [0, 1, 0]]
    torch.testing.assert_close(targets, torch.tensor(expected))


@given(seed=st.integers(0, 2**32), size=st.sampled_from([8, 32]))
@settings(deadline=None, max_examples=60)
def test_cutmix_gives_the_box_to_the_partner_and_its_area_to_the_targets(seed, size):
    mix = draw_mix(seed, np.zeros(2, np.int64), 0, mixup=0.0, cutmix=1.0, size=size)
    images = torch.stack([torch.zeros(3, size, size), torch.ones(3, size, size)])
    first, second = mix_images(images, mix)
    assert set(first.unique().tolist()) <= {0.0, 1.0} and torch.equal(first, 1 - second)
    assert float(mix[0, 0]) == pytest.approx(1 - float(first.mean()), abs=1e-6)
    box = first[0].nonzero()
    if len(box):
        (top, left), (bottom, right) = box.min(0).values, box.max(0).values + 1
        assert len(box) == (bottom - top) * (right - left)


def test_both_take_turns_by_chance_and_depend_on_seed_epoch_and_pair():
    def draw(seed: int, epoch: int, first: int) -> torch.Tensor:
        return draw_mix(seed, np.full(400, epoch), first, mixup=0.5, cutmix=1.0, size=224)

    mix = draw(0, 0, 0)
    boxes = int((mix[:, 4:].sum(1) > 0).sum())
    assert 60 < boxes < 140
    assert torch.equal(mix[50:], draw_mix(0, np.zeros(300, np.int64), 100, mixup=0.5, cutmix=1.0, size=224))
    for other in (draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 400)):
        assert not torch.equal(mix, other)
