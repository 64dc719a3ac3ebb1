"""`data.reader: webdataset`: shards without a manifest, read from end to end by `webdataset`.

This is for shards that must not be indexed. Each worker of each rank draws shards with replacement
and shuffles their samples through a buffer. All ranks have batches of equal size without end, but
some guarantees are lost: docs/data.md lists them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from prelora_ds.data.batch import MicroBatch
from prelora_ds.data.datasets import ImagePipeline, rng_for
from prelora_ds.data.decode import UndecodableError, decode
from prelora_ds.data.labels import LabelReader, SampleError
from prelora_ds.data.loader import Loader, rank_share
from prelora_ds.data.manifest import EXTENSIONS, is_url
from prelora_ds.data.order import Position, Stream
from prelora_ds.data.store import CorruptSampleError
from prelora_ds.data.workers import Workers, WorkerStart
from prelora_ds.errors import ConfigError

_BUFFER = 1000  # samples in the shuffle buffer of each worker
_STREAM_KEY = 4
_PIXEL_KEY = 5
_MAX_FAULTS_IN_A_ROW = 1000
_PATTERN = "write .../{000000..000999}.tar, for shards that exist"


@dataclass(frozen=True)
class Unindexed:
    """Shards named by a pattern such as ``/data/train-{000000..001023}.tar``.

    ``samples`` is the number of samples that count as an epoch.
    """

    pattern: str
    samples: int
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return self.samples

    def shards(self) -> list[str]:
        """Return the paths or URLs of the shards. Raises ConfigError if this is not a pattern."""
        from webdataset.shardlists import expand_source

        try:
            locations: list[str] = expand_source(self.pattern)
        except (ValueError, AssertionError) as error:  # AssertionError: a variable is not set
            raise ConfigError(
                "data.train", self.pattern, f"is not a pattern ({error})", _PATTERN
            ) from error
        return locations

    def check(self) -> None:
        """Raise ConfigError if this is not a pattern, or if none of its local shards exists."""
        locations = self.shards()
        if not any(
            is_url(location) or location.startswith("pipe:") or os.path.isfile(location)
            for location in locations
        ):
            raise ConfigError(
                "data.train", self.pattern, f"none of its {len(locations)} shards exists", _PATTERN
            )


class UnindexedLoader(Loader):
    """The batches of a rank from `Unindexed`, without the guarantees of `TrainLoader`.

    The samples change with ``start_step``, rank, world size, worker count and micro-batch.
    """

    def __init__(
        self,
        data: Unindexed,
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
    ) -> None:
        self._data = data
        self._seed = seed
        self._world = world_size
        super().__init__(
            pipeline,
            rank=rank,
            global_batch_size=global_batch_size,
            workers=workers,
            step=start_step,
            worker_start=worker_start,
            micro_batch_size=micro_batch_size,
            share=rank_share(rank, world_size, global_batch_size, micro_batch_size, pipeline),
        )

    def _open(self) -> Workers:
        key = (self._seed, self._step, self._rank, self._world)
        images = _Images(
            self._data,
            self._pipeline,
            key,
            micro=self._micro,
            share=self._share,
            global_batch_size=self._global_batch_size,
        )
        return Workers(images, None, self._workers, self._worker_start)

    @property
    def state(self) -> Position:
        """The epoch and offset, by the number of samples only."""
        return Stream(len(self._data), self._global_batch_size).position(self._step)


class _Images(IterableDataset[MicroBatch]):
    """The micro-batches of one worker: every ``workers``-th one of its rank."""

    def __init__(
        self,
        data: Unindexed,
        pipeline: ImagePipeline,
        key: tuple[int, ...],
        *,
        micro: int,
        share: int,
        global_batch_size: int,
    ) -> None:
        self._data = data
        self._pipeline = pipeline
        self._key = key
        self._micro = micro
        self._share = share
        self._global_batch_size = global_batch_size

    def __iter__(self) -> Iterator[MicroBatch]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        seed, step, rank, _ = self._key
        faults: list[str] = []
        samples = self._samples(number, faults)
        accum = self._share // self._micro
        count = 0
        while True:
            images = self._pipeline.empty_batch(self._micro)
            labels = []
            faults[:] = []
            for image in images:
                pixels, label = next(samples)
                count += 1
                rng = rng_for(*self._key, number, count, _PIXEL_KEY)
                image.copy_(self._pipeline.train_image(pixels, rng))
                labels.append(label)
            # The loader takes the batches of the workers in turn.
            steps_done, part = divmod(number, accum)
            first_of_step = (step + steps_done) * self._global_batch_size
            stream_offset = first_of_step + rank * self._share + part * self._micro
            epochs = np.arange(stream_offset, stream_offset + self._micro) // len(self._data)
            mix = self._pipeline.mix(seed, epochs, stream_offset)
            yield MicroBatch(images, torch.tensor(labels), mix, tuple(faults))
            number += workers

    def _samples(self, worker: int, faults: list[str]) -> Iterator[tuple[Any, int]]:
        """Yield (pixels, label) without end, and append a text to ``faults`` for what is skipped.

        Raises CorruptSampleError after too many faults in a row.
        """
        import webdataset as wds

        def handle(error: Exception) -> bool:
            return report(f"{type(error).__name__}: {error}")

        def report(fault: str) -> bool:
            faults.append(fault)
            if len(faults) > _MAX_FAULTS_IN_A_ROW:
                raise CorruptSampleError(
                    f"{_MAX_FAULTS_IN_A_ROW} faults in a row; the last: {faults[-1]}",
                    "check that data.train names shards of images with labels in .cls",
                )
            return True

        # wds.utils.make_seed differs between versions, so pass our own seed.
        worker_seed = int(rng_for(*self._key, worker, _STREAM_KEY).integers(2**31))
        stream = wds.DataPipeline(
            wds.ResampledShards(
                self._data.shards(), worker_seed=lambda: worker_seed, deterministic=True
            ),
            # No other member is read, pickled members in particular.
            wds.tarfile_to_samples(
                handler=handle, select_files=lambda name: name.lower().endswith(_MEMBERS)
            ),
            wds.shuffle(_BUFFER, rng=random.Random(worker_seed)),
        )
        labels = LabelReader(None, self._data.classes)
        for sample in stream:
            name = f"sample {sample['__key__']} of {sample['__url__']}"
            images = [key for key in sample if key in EXTENSIONS]
            try:
                if len(images) != 1 or "cls" not in sample:
                    report(f"{name}: each sample needs exactly one image and a .cls")
                    continue
                label = labels.read("cls", sample["cls"])
                yield decode(sample[images[0]], self._pipeline.num_channels), label
            except SampleError as error:
                report(f"{name} {error}")
            except UndecodableError as error:
                report(f"{name}: not an image: {error}")


_MEMBERS = (".cls", *(f".{extension}" for extension in EXTENSIONS))
