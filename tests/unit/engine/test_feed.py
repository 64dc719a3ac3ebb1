"""What a feed that looks ahead returns is what its loader returns, at the step at which it is due."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prelora_ds.data.batch import MicroBatch
from prelora_ds.data.datasets import ImagePipeline
from prelora_ds.data.loader import TrainLoader
from prelora_ds.data.manifest import Manifest
from prelora_ds.engine.feed import DeviceFeed

CPU = torch.device("cpu")


@pytest.fixture
def loaders(shards: Path) -> Iterator[list[TrainLoader]]:
    """Two loaders of the same micro-batches, of which pairs are mixed."""
    pipeline = ImagePipeline(16, 1, "inception", mixup=0.2)
    made = [TrainLoader(Manifest.load(shards / "train"), pipeline, seed=5, global_batch_size=24, micro_batch_size=4,
                        rank=1, world_size=2, workers=0) for _ in range(2)]
    yield made
    for loader in made:
        loader.close()


def same(one: list[MicroBatch], other: list[MicroBatch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.mix, b.mix)
        for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("sizes", [(2, 12), (6, 6)])
def test_the_micro_batches_are_those_of_the_loader_also_after_they_are_cut_again(
        loaders: list[TrainLoader], sizes: tuple[int, int], ahead: bool) -> None:
    plain, other = loaders
    feed = DeviceFeed(other, CPU, ahead=ahead)
    for size in (None, *sizes):
        if size is not None:
            plain.rebatch(size)
            feed.rebatch(size)  # after it has looked ahead
        for _ in range(2):
            assert same(feed.next(), plain.next())
            assert (feed.look_ahead() > 0) == ahead
            assert other.step == plain.step + ahead


def test_on_a_cpu_a_feed_does_not_look_ahead(loaders: list[TrainLoader]) -> None:
    feed = DeviceFeed(loaders[0], CPU)
    feed.next()
    assert feed.look_ahead() == 0.0 and loaders[0].step == 1 and feed.waited_s == loaders[0].waited_s > 0


def test_an_error_of_the_loader_waits_for_the_step_that_it_concerns(loaders: list[TrainLoader]) -> None:
    feed = DeviceFeed(loaders[0], CPU, ahead=True)
    feed.next()
    loaders[0].close()
    assert feed.look_ahead() > 0
    with pytest.raises(ValueError, match="the loader is closed"):
        feed.next()
