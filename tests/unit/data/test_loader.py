"""What the ranks get: together the global batch, the same pixels whoever decodes them, and each val sample once."""

from __future__ import annotations

import io
import multiprocessing
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from prelora_ds.data.datasets import ImagePipeline
from prelora_ds.data.loader import TrainLoader, eval_batches
from prelora_ds.data.order import Stream, epoch_order
from prelora_ds.data.shards.writer import write_shards
from prelora_ds.errors import ConfigError

SAMPLES = 50
PIPELINE = ImagePipeline(16, 3, "inception", flip=True)
OPTIONS = {"pipeline": PIPELINE, "seed": 5, "global_batch_size": 24, "micro_batch_size": 2, "rank": 0, "world_size": 1,
           "workers": 0}
EVAL = {"pipeline": PIPELINE, "batch_size": 4, "rank": 0, "world_size": 1, "workers": 0}


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
    return torch.cat([batch.images for batch in step]), torch.cat([batch.labels for batch in step])


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
    for images, labels, mix, faults in step:
        assert mix is None and faults == ()
        assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8 and images.is_contiguous()
        assert labels.shape == (2,) and labels.dtype == torch.int64
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        loader.next()


def test_every_sample_comes_once_per_epoch(manifest):
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
        expected = Stream(SAMPLES, 24).batch(seed, start + number)[:, 1].tolist()
        assert torch.cat([images_and_labels(rank[number])[1] for rank in ranks]).tolist() == expected


@given(data=st.data(), world_size=st.integers(1, 8), micro=st.integers(1, 3), accum=st.integers(1, 3),
       tail=st.sampled_from(["continue", "drop"]), epoch=st.integers(0, 300), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=60)
def test_the_union_of_ranks_is_the_sequence_disjoint_and_whole(manifest, data, world_size, micro, accum, tail, epoch,
                                                               seed):
    size = world_size * micro * accum
    assume(tail == "continue" or size <= SAMPLES)
    stream = Stream(SAMPLES, size, tail)
    start = -(-epoch * stream.samples_per_epoch // size) + data.draw(st.integers(0, SAMPLES // size), "steps into it")
    ranks = []
    for rank in range(world_size):
        loader = TrainLoader(manifest, PIPELINE, seed=seed, global_batch_size=size, micro_batch_size=micro, rank=rank,
                             world_size=world_size, workers=0, tail=tail,
                             start_step=stream.step_at(stream.position(start)))
        assert loader.state == stream.position(start)
        ranks.append(loader._rows(start))
    count = 2 * -(-SAMPLES // size)  # at least two epochs
    places, seen = [], []
    for _ in range(count):
        for rows in (next(rank) for rank in ranks for _ in range(accum)):
            assert len(rows.samples) == micro
            places += range(rows.stream_offset, rows.stream_offset + micro)
            seen += zip(rows.epochs.tolist(), rows.samples.tolist(), strict=True)
    assert places == list(range(start * size, (start + count) * size))
    per_epoch = stream.samples_per_epoch
    assert seen == [(place // per_epoch, int(epoch_order(seed, place // per_epoch, SAMPLES)[place % per_epoch]))
                    for place in places]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("crop", ["inception", "pad", "none"])
def test_pixels_do_not_depend_on_the_world_size(manifest, crop):
    pipeline = replace(PIPELINE, crop=crop)
    whole = steps(manifest, 3, pipeline=pipeline)
    halves = [steps(manifest, 3, pipeline=pipeline, world_size=2, rank=rank, micro_batch_size=4) for rank in range(2)]
    assert_same(whole, [first + second for first, second in zip(*halves, strict=True)])


def test_pixels_do_not_depend_on_workers_and_these_end_with_the_loader(manifest):
    loader = TrainLoader(manifest, **OPTIONS | {"workers": 2})
    assert len(workers()) == 2
    parallel = [loader.next() for _ in range(3)]
    loader.close()
    assert ended()
    assert_same(parallel, steps(manifest, 3))


@pytest.mark.parametrize("workers_", [0, 1])
def test_a_loader_of_another_world_continues_where_the_state_says(manifest, workers_):
    loader = TrainLoader(manifest, **OPTIONS)
    before = [loader.next() for _ in range(4)]
    epoch, offset = state = loader.state
    assert (epoch, offset) == divmod(4 * 24, SAMPLES)
    loader.close()
    start = Stream(SAMPLES, 24).step_at(state)
    ranks = [steps(manifest, 2, start_step=start, world_size=3, rank=rank, micro_batch_size=4, workers=workers_)
             for rank in range(3)]
    assert_same(steps(manifest, 6), before + [sum(parts, []) for parts in zip(*ranks, strict=True)])  # noqa: RUF017


@pytest.mark.parametrize("workers_", [0, 2])
def test_another_micro_batch_under_way_cuts_the_same_rows(manifest, workers_):
    loader = TrainLoader(manifest, **OPTIONS | {"global_batch_size": 12, "micro_batch_size": 2, "rank": 1,
                                                "world_size": 2, "workers": workers_})
    got = [loader.next(), loader.next()]
    loader.rebatch(6)
    got += [loader.next(), loader.next()]
    loader.rebatch(3)
    got.append(loader.next())
    with pytest.raises(ValueError, match="not a multiple of 4"):
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


def test_the_global_generator_is_left_unchanged(manifest):
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
        steps(manifest, 1, pipeline=replace(PIPELINE, num_channels=4))


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


def test_more_shards_than_files_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("prelora_ds.data.store._OPEN_FILES", 2)
    many = write_shards([(str(i), encode(noise(i), "PNG"), "png", i) for i in range(7)], tmp_path / "many",
                        samples_per_shard=1, class_names="abcdefg")
    for _ in range(2):
        labels = torch.cat([labels[mask] for _, labels, mask in eval_batches(many, **EVAL)])
        assert labels.tolist() == list(range(7))
