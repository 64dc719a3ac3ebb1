"""What the ranks get: together the global batch, the same pixels whoever decodes them, and each val sample once."""

from __future__ import annotations

import io
import multiprocessing
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prelora_ds.core.errors import ConfigError
from prelora_ds.data.loader import CorruptSampleError, TrainLoader, eval_batches
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.order import global_batch
from prelora_ds.data.transforms import decode, eval_transform, to_float, train_transform
from prelora_ds.data.writer import write_shards

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")  # in favour of TorchCodec

SAMPLES = 50
OPTIONS = {"seed": 5, "global_batch_size": 24, "micro_batch_size": 2, "rank": 0, "world_size": 1, "image_size": 16,
           "num_channels": 3, "crop": "inception", "flip": True, "workers": 0}
EVAL = {"batch_size": 4, "rank": 0, "world_size": 1, "image_size": 16, "num_channels": 3, "crop": "inception",
        "workers": 0}


def noise(number):
    rng = np.random.default_rng(number)
    size = (int(rng.integers(20, 60)), int(rng.integers(20, 60)), 3)
    return Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))


def encode(image, form):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Each sample is a class of its own, so that a label tells the sample."""
    samples = ((f"{i:03d}", encode(noise(i), "JPEG"), "jpg", i) for i in range(SAMPLES))
    return write_shards(samples, tmp_path_factory.mktemp("data") / "train", samples_per_shard=20,
                        class_names=list(map(str, range(SAMPLES))))


def steps(manifest, count, **changes):
    """The micro-batches of ``count`` steps, as [step][micro-batch] -> (images, labels)."""
    loader = TrainLoader(manifest, **OPTIONS | changes)
    try:
        return [loader.next() for _ in range(count)]
    finally:
        loader.close()


def images_and_labels(step):
    return torch.cat([images for images, _ in step]), torch.cat([labels for _, labels in step])


def assert_same(one, other):
    assert len(one) == len(other)
    for (images, labels), (others, other_labels) in zip(map(images_and_labels, one), map(images_and_labels, other),
                                                        strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)


def ended(deadline_s=10.0):
    until = time.monotonic() + deadline_s
    while workers() and time.monotonic() < until:
        time.sleep(0.05)
    return not workers()


def workers():
    """The loaders' processes; other children belong to other tests."""
    return [child for child in multiprocessing.active_children() if type(child).__name__ == "ForkServerProcess"]


def test_shapes_types_and_step(manifest):
    loader = TrainLoader(manifest, **OPTIONS | {"world_size": 3, "rank": 1, "start_step": 4})
    assert loader.step == 4
    step = loader.next()
    assert loader.step == 5 and len(step) == 24 // 3 // 2
    for images, labels in step:
        assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8 and images.is_contiguous()
        assert labels.shape == (2,) and labels.dtype == torch.int64
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        loader.next()


def test_every_sample_comes_once_an_epoch(manifest):
    labels = torch.cat([images_and_labels(step)[1] for step in steps(manifest, 25)]).tolist()
    assert len(labels) == 12 * SAMPLES
    for epoch in range(12):
        assert sorted(labels[epoch * SAMPLES:(epoch + 1) * SAMPLES]) == list(range(SAMPLES))


@given(world_size=st.sampled_from([1, 2, 3, 4]), micro=st.sampled_from([1, 2]), start=st.integers(0, 30),
       seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=12)
def test_the_ranks_together_get_the_global_batch_in_its_order(manifest, world_size, micro, start, seed):
    ranks = [steps(manifest, 2, seed=seed, world_size=world_size, rank=rank, micro_batch_size=micro, start_step=start)
             for rank in range(world_size)]
    for number in range(2):
        expected = global_batch(seed, start + number, SAMPLES, 24)[:, 1].tolist()
        assert torch.cat([images_and_labels(rank[number])[1] for rank in ranks]).tolist() == expected


@pytest.mark.parametrize("crop", ["inception", "pad", "none"])
def test_pixels_do_not_depend_on_the_world_size(manifest, crop):
    whole = steps(manifest, 3, crop=crop)
    halves = [steps(manifest, 3, crop=crop, world_size=2, rank=rank, micro_batch_size=4) for rank in range(2)]
    assert_same(whole, [first + second for first, second in zip(*halves, strict=True)])


def test_pixels_do_not_depend_on_workers_and_these_end_with_the_loader(manifest):
    loader = TrainLoader(manifest, **OPTIONS | {"workers": 2})
    assert len(workers()) == 2
    parallel = [loader.next() for _ in range(3)]
    loader.close()
    assert ended()
    assert_same(parallel, steps(manifest, 3))


def test_a_later_start_goes_on_with_the_same_batches(manifest):
    assert_same(steps(manifest, 6)[4:], steps(manifest, 2, start_step=4))


@pytest.mark.parametrize("workers_", [0, 2])
def test_another_micro_batch_under_way_cuts_the_same_rows(manifest, workers_):
    loader = TrainLoader(manifest, **OPTIONS | {"global_batch_size": 12, "micro_batch_size": 2, "rank": 1,
                                                "world_size": 2, "workers": workers_})
    got = [loader.next(), loader.next()]
    loader.rebatch(6)
    got += [loader.next(), loader.next()]
    loader.rebatch(3)
    got.append(loader.next())
    with pytest.raises(ValueError, match="no multiple of 4"):
        loader.rebatch(4)
    assert loader.step == 5
    loader.close()
    assert [len(step) for step in got] == [3, 3, 1, 1, 2]
    assert_same(got, steps(manifest, 5, global_batch_size=12, micro_batch_size=6, rank=1, world_size=2))
    ended()
    assert not workers()


def test_epochs_and_seeds_show_other_pixels_of_the_same_sample(manifest):
    def of_sample_0(seed, start):
        for step in steps(manifest, 3, seed=seed, start_step=start):
            images, labels = images_and_labels(step)
            if 0 in labels:
                return images[labels.tolist().index(0)]
        raise AssertionError("sample 0 is in each epoch")

    first = of_sample_0(5, 0)
    assert not torch.equal(first, of_sample_0(5, 25)) and not torch.equal(first, of_sample_0(6, 0))


def test_the_global_generator_is_left_alone(manifest):
    before = torch.get_rng_state()
    steps(manifest, 1)
    steps(manifest, 1, workers=1)
    list(eval_batches(manifest, **EVAL))
    assert torch.equal(torch.get_rng_state(), before)


def test_impossible_batches_and_ranks_are_refused(manifest):
    with pytest.raises(ConfigError, match=r"train\.global_batch_size = 24.*2 x 5 ranks"):
        TrainLoader(manifest, **OPTIONS | {"world_size": 5})
    with pytest.raises(ValueError, match="rank 2"):
        TrainLoader(manifest, **OPTIONS | {"world_size": 2, "rank": 2})
    with pytest.raises(ValueError, match="rank 2"):
        next(eval_batches(manifest, **EVAL | {"world_size": 2, "rank": 2}))
    with pytest.raises(ConfigError, match=r"model\.num_channels = 4"):
        steps(manifest, 1, num_channels=4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_counts_every_sample_once_at_any_world_size(manifest, world_size, batch_size):
    ranks = [list(eval_batches(manifest, **EVAL | {"rank": rank, "world_size": world_size, "batch_size": batch_size}))
             for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for images, labels, mask in (batch for batches in ranks for batch in batches):
        assert images.shape == (batch_size, 3, 16, 16) and images.dtype == torch.uint8
        assert labels.shape == mask.shape == (batch_size,)
        assert labels.dtype == torch.int64 and mask.dtype == torch.bool
        seen += labels[mask].tolist()
    assert seen == list(range(SAMPLES))


def test_evaluation_with_more_ranks_than_samples(tmp_path):
    few = write_shards([(str(i), encode(noise(i), "PNG"), "png", i) for i in range(3)], tmp_path / "few",
                       samples_per_shard=2, class_names="abc")
    masks = [[mask.tolist() for _, _, mask in eval_batches(few, **EVAL | {"rank": rank, "world_size": 5})]
             for rank in range(5)]
    assert masks == [[[True, False, False, False]]] * 3 + [[[False] * 4]] * 2


def test_evaluation_with_workers_gives_the_same_and_ends_them_even_when_left_early(manifest):
    plain, parallel = (list(eval_batches(manifest, **EVAL | {"workers": workers})) for workers in (0, 2))
    assert len(plain) == len(parallel) == 13
    for one, other in zip(plain, parallel, strict=True):
        assert all(map(torch.equal, one, other))
    batches = eval_batches(manifest, **EVAL | {"workers": 1})
    next(batches)
    batches.close()
    assert ended()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_decoded_is_named_by_shard_and_offset(tmp_path, workers):
    samples = [(str(i), b"no image at all" if i == 3 else encode(noise(i), "PNG"), "png", 0) for i in range(4)]
    bad = write_shards(samples, tmp_path / "bad", samples_per_shard=2, class_names=["one"])
    place = rf"from byte {bad.rows['offset'][3]} of .*shard-000001\.tar"
    loader = TrainLoader(bad, **OPTIONS | {"global_batch_size": 4, "micro_batch_size": 4, "workers": workers})
    with pytest.raises(CorruptSampleError, match=place):
        loader.next()
    with pytest.raises(ValueError, match="closed"):  # and not the batch after the broken one
        loader.next()


def test_a_shard_cut_short_under_way_is_named(tmp_path):
    cut = write_shards([("0", encode(noise(0), "PNG"), "png", 0)], tmp_path / "cut", samples_per_shard=1,
                       class_names=["one"])
    path = cut.folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:cut.rows[0]["offset"] + 10])
    with pytest.raises(CorruptSampleError, match=r"shard-000000\.tar: only 10 bytes there"):
        list(eval_batches(cut, **EVAL))
    with pytest.raises(ConfigError, match=r"shard-000000\.tar"):
        Manifest.load(cut.folder)


def test_more_shards_than_files_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("prelora_ds.data.loader._OPEN_FILES", 2)
    many = write_shards([(str(i), encode(noise(i), "PNG"), "png", i) for i in range(7)], tmp_path / "many",
                        samples_per_shard=1, class_names="abcdefg")
    for _ in range(2):
        labels = torch.cat([labels[mask] for _, labels, mask in eval_batches(many, **EVAL)])
        assert labels.tolist() == list(range(7))


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 1), ("RGBA", 3), ("P", 3), ("1", 1), ("CMYK", 3)])
def test_other_channel_counts_are_converted(mode, channels):
    image = Image.new("RGB", (12, 10), (200, 30, 90)).convert(mode)
    tensor = decode(bytearray(encode(image, "JPEG" if mode == "CMYK" else "PNG")), channels)
    expected = np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(10, 12, channels).transpose(2, 0, 1)
    assert tensor.shape == (channels, 10, 12) and tensor.dtype == torch.uint8
    assert np.abs(tensor.numpy().astype(int) - expected).max() <= 2


def test_the_inception_crop_stays_within_5_to_100_per_cent_and_its_ratios():
    """On a picture whose pixels are their own coordinates, a crop tells its box."""
    height, width, size = 200, 240, 224
    grid = torch.stack([torch.arange(height)[:, None].expand(height, width),
                        torch.arange(width).expand(height, width), torch.zeros(height, width)]).to(torch.uint8)
    shares, flipped = [], 0
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        crop = train_transform(grid, image_size=size, crop="inception", flip=True, generator=generator).int()
        rows, columns = crop[0, :, 0], crop[1, 0]
        flipped += int(columns[0] > columns[-1])
        h, w = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        shares.append(h * w / (height * width))
        assert 0.68 < w / h < 1.47  # 3/4 to 4/3, with the rounding of the box and of the resize
    assert 0.04 < min(shares) < 0.08 and 0.9 < max(shares) <= 1.0
    assert 0.4 < np.mean(shares) < 0.55  # uniform in 0.05..1, the largest fitting less often
    assert 160 < flipped < 240


def test_the_pad_crop_moves_the_picture_by_at_most_the_margin():
    picture = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 8, 8)
    padded = torch.nn.functional.pad(picture, (1,) * 4)
    windows = {tuple(padded[0, top:top + 8, left:left + 8].flatten().tolist()) for top in range(3) for left in range(3)}
    seen = {tuple(train_transform(picture, image_size=8, crop="pad", flip=False,
                                  generator=torch.Generator().manual_seed(seed)).flatten().tolist())
            for seed in range(200)}
    assert seen == windows


def test_none_and_the_plain_evaluation_leave_a_picture_of_the_size_as_it_is():
    picture = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
    generator = torch.Generator()
    assert torch.equal(train_transform(picture, image_size=8, crop="none", flip=False, generator=generator), picture)
    assert torch.equal(eval_transform(picture, image_size=8, crop="pad"), picture)
    assert eval_transform(picture, image_size=4, crop="none").shape == (1, 4, 4)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (73, 73), (64, 64), (30, 500)])
def test_evaluation_resizes_and_crops_as_torchvision_does(height, width):
    from torchvision.transforms.v2.functional import center_crop, resize

    picture = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = center_crop(resize(picture, [73], antialias=True), [64, 64])
    assert torch.equal(eval_transform(picture, image_size=64, crop="inception"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_float_maps_bytes_to_minus_one_to_one_rounded_once(dtype):
    values = torch.arange(256, dtype=torch.uint8)
    expected = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)
    result = to_float(values, dtype)
    assert result.dtype == dtype and (result[0], result[255]) == (-1, 1)
    assert (result.double() - expected).abs().max() <= torch.finfo(dtype).eps / 2
