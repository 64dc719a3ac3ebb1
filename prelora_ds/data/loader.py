"""Batches for training and evaluation: decoded and cropped here, by worker processes, and sent as uint8.

What a rank gets depends on seed, step and world size alone; how many workers make it changes nothing.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from prelora_ds.core.errors import ConfigError, ExpectedError
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.order import global_batch
from prelora_ds.data.transforms import Crop, decode, eval_transform, train_transform

MicroBatch = tuple[Tensor, Tensor]
_OPEN_FILES = 256  # a process may open 1,024 files, and a data set has more shards than that
_PADDING = -1


class CorruptSampleError(ExpectedError, RuntimeError):
    """An image that cannot be read or decoded; names its shard and byte offset."""


class _Images(Dataset[Any]):
    """The decoded images of a manifest, which each worker maps anew."""

    def __init__(self, manifest: Manifest, *, image_size: int, num_channels: int, crop: Crop) -> None:
        self.image_size, self.num_channels, self.crop = image_size, num_channels, crop
        self._manifest = manifest
        self._files: dict[str, int] = {}  # path -> descriptor

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def read(self, sample: int) -> tuple[Tensor, int]:
        """(uint8 [C, H, W], label) of sample ``sample``. Raises CorruptSampleError."""
        row = self._manifest.rows[sample]
        path, data = self._manifest.place(row["shard"]), bytearray(row["length"])
        try:
            if (got := os.preadv(self._descriptor(path), [data], row["offset"])) != len(data):
                raise OSError(f"only {got} bytes there")
            return decode(data, self.num_channels), int(row["label"])
        except (OSError, RuntimeError) as error:
            problem = f"sample {sample}, {len(data)} bytes from byte {row['offset']} of {path}: {error}"
            raise CorruptSampleError(problem + "\n  remedy: write the shards again with `prelora shards`") from error

    def _descriptor(self, path: str) -> int:
        if path not in self._files:
            if len(self._files) == _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


class _TrainImages(_Images):
    def __init__(self, manifest: Manifest, *, seed: int, flip: bool, **options: Any) -> None:
        super().__init__(manifest, **options)
        self._seed, self._flip = seed, flip

    def __getitem__(self, row: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, sample = row
        image, label = self.read(sample)
        # Keyed by the sample and not by the worker; the 1 keeps it apart from the key of `epoch_order`.
        key = np.random.SeedSequence((self._seed, epoch, sample, 1)).generate_state(1)[0]
        image = train_transform(image, image_size=self.image_size, crop=self.crop, flip=self._flip,
                                generator=torch.Generator().manual_seed(int(key)))
        return image, label


class _EvalImages(_Images):
    def __getitem__(self, sample: int) -> tuple[Tensor, int, bool]:
        if sample == _PADDING:
            return torch.zeros((self.num_channels, self.image_size, self.image_size), dtype=torch.uint8), 0, False
        image, label = self.read(sample)
        return eval_transform(image, image_size=self.image_size, crop=self.crop), label, True


def _batches(dataset: _Images, keys: Iterable[list[Any]], workers: int) -> Iterator[Any]:
    """A batch for each list of keys, in their order. ``workers`` processes end when the iterator is dropped."""
    if workers == 0:
        return (_in_process(dataset, batch) for batch in keys)
    # A fork of this process would copy gloo's and OpenMP's locks without the threads that release them. The fork server
    # is a clean process; it imports torch once, and its forks are the workers (of one thread each, by DataLoader).
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision.io", __name__])
    return iter(DataLoader(
        dataset, batch_sampler=keys, num_workers=workers, multiprocessing_context=context,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from the global generator, and dropout would depend on workers
    ))


def _in_process(dataset: _Images, batch: list[Any]) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # an image is too little to share: on two busy cores, two threads were 15 times slower
    try:
        return default_collate([dataset[key] for key in batch])
    finally:
        torch.set_num_threads(threads)


def _rank_rows(seed: int, step: int, samples: int, global_batch_size: int, owned: slice,
               micro_batch_size: int) -> Iterator[list[tuple[int, int]]]:
    """The rows (epoch, sample) of one rank's micro-batches from ``step`` on, without end."""
    for now in count(step):
        rows = global_batch(seed, now, samples, global_batch_size)[owned].tolist()
        yield from (rows[start:start + micro_batch_size] for start in range(0, len(rows), micro_batch_size))


class TrainLoader:
    """This rank's part of the global batches, from ``start_step`` on.

    Rank r owns the rows r*G/W to (r+1)*G/W of a global batch; micro-batch j is the j-th slice of these. With workers,
    the program's entry needs its ``if __name__ == "__main__"``. Raises ConfigError when the global batch is no multiple
    of micro-batch x ranks, ValueError for a rank outside of the world.
    """

    def __init__(self, manifest: Manifest, *, seed: int, global_batch_size: int, micro_batch_size: int, rank: int,
                 world_size: int, image_size: int, num_channels: int, crop: Crop, flip: bool, workers: int,
                 start_step: int = 0) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        if global_batch_size % (micro_batch_size * world_size):
            raise ConfigError("train.global_batch_size", global_batch_size,
                              f"no multiple of train.micro_batch_size {micro_batch_size} x {world_size} ranks",
                              f"use a multiple of {micro_batch_size * world_size}")
        share = global_batch_size // world_size
        self._step, self._workers, self._share = start_step, workers, share
        self._rows = partial(_rank_rows, seed, samples=len(manifest), global_batch_size=global_batch_size,
                             owned=slice(rank * share, (rank + 1) * share))
        self._images = _TrainImages(manifest, seed=seed, flip=flip, image_size=image_size, num_channels=num_channels,
                                    crop=crop)
        self._begin(micro_batch_size)

    def _begin(self, micro_batch_size: int) -> None:
        self._accum = self._share // micro_batch_size
        rows = self._rows(self._step, micro_batch_size=micro_batch_size)
        self._batches: Iterator[MicroBatch] | None = _batches(self._images, rows, self._workers)

    def rebatch(self, micro_batch_size: int) -> None:
        """Cut this and all later steps' rows, which stay the same, into micro-batches of another size.

        Raises ValueError when it does not divide the rank's share of the global batch.
        """
        if self._share % micro_batch_size:
            raise ValueError(f"{self._share} rows a rank and step are no multiple of {micro_batch_size}")
        if self._accum != self._share // micro_batch_size:
            self._batches = None  # ends the workers
            self._begin(micro_batch_size)

    @property
    def step(self) -> int:
        """The optimizer step whose batch `next` returns; with ``start_step``, a new loader goes on from here."""
        return self._step

    def next(self) -> list[MicroBatch]:
        """The step's micro-batches, each (images uint8 [B, C, S, S], labels int64 [B]).

        Raises CorruptSampleError, after which the loader is closed, and ValueError on a closed loader.
        """
        if self._batches is None:
            raise ValueError("the loader is closed")
        try:
            micro_batches = []
            for _ in range(self._accum):
                images, labels = next(self._batches)
                micro_batches.append((images, labels))
        except Exception:
            self.close()  # part of the step is consumed, and the next call would give a shifted batch
            raise
        self._step += 1
        return micro_batches

    def close(self) -> None:
        """End the workers and close the shards; a second call does nothing."""
        self._batches = None
        self._images.close()


def eval_batches(manifest: Manifest, *, batch_size: int, rank: int, world_size: int, image_size: int,
                 num_channels: int, crop: Crop, workers: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(images uint8 [B, C, S, S], labels int64 [B], mask bool [B]) over this rank's contiguous share of the samples.

    Every rank gets the same number of batches of exactly ``batch_size`` rows; where samples run out, images are black
    and the mask is False. True masks over all ranks count every sample once. Raises CorruptSampleError,
    and ValueError for a rank outside of the world.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    share = -(-len(manifest) // world_size)
    start, stop = min(rank * share, len(manifest)), min((rank + 1) * share, len(manifest))
    rows = -(-share // batch_size) * batch_size
    samples = [*range(start, stop), *[_PADDING] * (rows - (stop - start))]
    dataset = _EvalImages(manifest, image_size=image_size, num_channels=num_channels, crop=crop)
    try:
        yield from _batches(dataset, [samples[i:i + batch_size] for i in range(0, rows, batch_size)], workers)
    finally:
        dataset.close()
