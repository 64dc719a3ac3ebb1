"""Batches for training and evaluation, decoded and cropped on the CPU and passed on as uint8.

What a rank gets is a function of seed, step and world size; the number of workers changes nothing.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count

from torch import Tensor

from prelora_ds.console import stamped
from prelora_ds.data.batch import MicroBatch
from prelora_ds.data.cache import CacheFiller, ShardCache
from prelora_ds.data.datasets import PADDING, BatchRows, EvalImages, ImagePipeline, TrainImages
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.order import Position, Stream, Tail
from prelora_ds.data.store import SampleStore
from prelora_ds.data.workers import Workers, WorkerStart
from prelora_ds.errors import ConfigError

_MAX_WARNINGS = 20


class Loader(ABC):
    """The micro-batches of a rank, step after step; subclasses implement `_open`.

    waited_s: seconds that the last call of `next` took.

    With workers, the main script needs an ``if __name__ == "__main__"`` guard.
    """

    def __init__(
        self,
        pipeline: ImagePipeline,
        *,
        rank: int,
        global_batch_size: int,
        share: int,
        micro_batch_size: int,
        workers: int,
        worker_start: WorkerStart,
        step: int,
    ) -> None:
        self._pipeline = pipeline
        self._rank = rank
        self._global_batch_size = global_batch_size
        self._share = share
        self._micro = micro_batch_size
        self._workers = workers
        self._worker_start = worker_start
        self._step = step
        self._warnings = 0
        self.waited_s = 0.0
        self._batches: Workers | None = self._open()

    @abstractmethod
    def _open(self) -> Workers:
        """The micro-batches of ``_micro`` rows from ``_step`` on."""

    @property
    @abstractmethod
    def state(self) -> Position:
        """The position at which the next batch begins."""

    @property
    def step(self) -> int:
        """The optimizer step whose batch `next` returns.

        A new loader with this ``start_step`` continues from here.
        """
        return self._step

    def rebatch(self, micro_batch_size: int) -> None:
        """Cut the rows of this and all later steps into micro-batches of another size.

        Raises ValueError if the size does not divide the rank's share of the global batch, or
        would split a pair.
        """
        if self._share % micro_batch_size or (self._pipeline.mixes and micro_batch_size % 2):
            raise ValueError(
                f"{self._share} rows per rank and step are not a multiple of {micro_batch_size}, "
                f"or {micro_batch_size} is odd while Mixup or CutMix is on"
            )
        if self._micro != micro_batch_size:
            self._batches = None  # ends the workers
            self._micro = micro_batch_size
            self._batches = self._open()

    def next(self) -> list[MicroBatch]:
        """Return the micro-batches of the step.

        A sample that cannot be read is replaced by another, and reported on stderr and in
        `MicroBatch.faults`. Raises CorruptSampleError if no replacement can be read either,
        WorkerLostError, and ValueError on a closed loader; the first two close the loader.
        """
        if self._batches is None:
            raise ValueError("the loader is closed")
        started = time.perf_counter()
        try:
            micro_batches = [next(self._batches) for _ in range(self._share // self._micro)]
        except Exception:
            # A part of the step is consumed, and the next call would return a shifted batch.
            self.close()
            raise
        self._step += 1
        self.waited_s = time.perf_counter() - started
        for fault in (fault for batch in micro_batches for fault in batch.faults):
            if self._warnings < _MAX_WARNINGS:
                warning = f"warning (rank {self._rank}, step {self._step}): {fault}"
                print(stamped(warning), file=sys.stderr, flush=True)
            self._warnings += 1
        return micro_batches

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        self._batches = None


class TrainLoader(Loader):
    """This rank's part of the global batches of a manifest, from ``start_step`` on.

    Rank r of W has the rows r*G/W to (r+1)*G/W of a global batch of G rows; micro-batch j is the
    j-th slice of these.

    Raises ConfigError if the global batch is not a multiple of micro-batch x ranks, and if pairs
    are mixed and the micro-batch is odd; ValueError for a rank outside of the world.
    """

    def __init__(
        self,
        manifest: Manifest,
        pipeline: ImagePipeline,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
        worker_start: WorkerStart = "forkserver",
        start_step: int = 0,
        tail: Tail = "continue",
        cache: ShardCache | None = None,
    ) -> None:
        share = rank_share(rank, world_size, global_batch_size, micro_batch_size, pipeline)
        self.stream = Stream(len(manifest), global_batch_size, tail)
        self._seed = seed
        self._images = TrainImages(SampleStore(manifest, cache), pipeline, seed)
        super().__init__(
            pipeline,
            rank=rank,
            global_batch_size=global_batch_size,
            share=share,
            workers=workers,
            micro_batch_size=micro_batch_size,
            worker_start=worker_start,
            step=start_step,
        )
        self._cache_filler = None if cache is None else CacheFiller(manifest, cache)

    def _open(self) -> Workers:
        return Workers(self._images, self._rows(self._step), self._workers, self._worker_start)

    def _rows(self, start_step: int) -> Iterator[BatchRows]:
        """The rows of this rank's micro-batches from ``start_step`` on, without end."""
        micro = self._micro
        first_of_rank = self._rank * self._share
        for step in count(start_step):
            rows = self.stream.batch(self._seed, step)
            for first in range(first_of_rank, first_of_rank + self._share, micro):
                epochs, samples = rows[first : first + micro].T.copy()
                yield BatchRows(epochs, samples, step * self._global_batch_size + first)

    @property
    def state(self) -> Position:
        """The position at which the next batch begins.

        `Stream.step_at` returns the step of it, from which any world size can continue.
        """
        return self.stream.position(self._step)

    def close(self) -> None:
        """End the workers, stop copying and close the shards; a second call does nothing."""
        super().close()
        self._images.store.close()
        if self._cache_filler is not None:
            self._cache_filler.close()


def rank_share(
    rank: int,
    world_size: int,
    global_batch_size: int,
    micro_batch_size: int,
    pipeline: ImagePipeline,
) -> int:
    """The number of rows of a global batch that each rank has.

    Raises ConfigError and ValueError as `TrainLoader` does.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    if global_batch_size % (micro_batch_size * world_size):
        raise ConfigError(
            "train.global_batch_size",
            global_batch_size,
            f"is not a multiple of train.micro_batch_size {micro_batch_size} x {world_size} ranks",
            f"use a multiple of {micro_batch_size * world_size}",
        )
    if pipeline.mixes and micro_batch_size % 2:
        raise ConfigError(
            "train.micro_batch_size",
            micro_batch_size,
            "is odd, and Mixup and CutMix need whole pairs",
            "use an even one, or data.mixup=0 data.cutmix=0",
        )
    return global_batch_size // world_size


def eval_batches(
    manifest: Manifest,
    pipeline: ImagePipeline,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    worker_start: WorkerStart = "forkserver",
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (images uint8 [B, C, S, S], labels int64 [B], mask bool [B]) of this rank's samples.

    A rank has a contiguous share of the samples. Every rank gets the same number of batches of
    exactly ``batch_size`` rows; where samples run out, images are black and the mask is False.
    The True masks of all ranks together count every sample once.

    Raises CorruptSampleError, because a replacement would make the count wrong, and ValueError
    for a rank outside of the world.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    share = -(-len(manifest) // world_size)
    start = min(rank * share, len(manifest))
    stop = min((rank + 1) * share, len(manifest))
    rows = -(-share // batch_size) * batch_size
    samples = [*range(start, stop), *[PADDING] * (rows - (stop - start))]
    keys = [samples[i : i + batch_size] for i in range(0, rows, batch_size)]
    dataset = EvalImages(SampleStore(manifest), pipeline)
    batches = Workers(dataset, keys, workers, worker_start)
    try:
        yield from batches
    finally:
        batches.close()
        dataset.store.close()
