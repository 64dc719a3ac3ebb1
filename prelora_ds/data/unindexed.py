"""`data.reader: webdataset`: shards without a manifest, read from end to end by the `webdataset` package.

For shards that nobody may index. Shards are drawn with replacement, by each worker of each rank for itself, and
shuffled through a buffer. So batches are equal on all ranks and never end, and much is lost: docs/data.md says what.
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

_BUFFER = 1000  # samples of the shuffle, a worker
_STREAM_KEY, _PIXEL_KEY = 4, 5
_HOPELESS = 1000  # faults in a row
_PATTERN = "write .../{000000..000999}.tar, for shards that are there"


@dataclass(frozen=True)
class Unindexed:
    """Shards by a pattern (``/data/train-{000000..001023}.tar``), of which ``samples`` are taken for an epoch."""

    pattern: str
    samples: int
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return self.samples

    def shards(self) -> list[str]:
        """Paths or URLs. Raises ConfigError for what is not a pattern."""
        from webdataset.shardlists import expand_source

        try:
            found: list[str] = expand_source(self.pattern)
        except (ValueError, AssertionError) as error:  # the latter for a variable that is not set
            raise ConfigError(
                "data.train", self.pattern, f"is not a pattern ({error})", _PATTERN
            ) from error
        return found

    def check(self) -> None:
        """Raise ConfigError for what is not a pattern, and where no local shard is there."""
        found = self.shards()
        if not any(
            is_url(place) or place.startswith("pipe:") or os.path.isfile(place) for place in found
        ):
            raise ConfigError(
                "data.train", self.pattern, f"none of its {len(found)} shards is there", _PATTERN
            )


class UnindexedLoader(Loader):
    """A rank's batches out of `Unindexed`; the interface of `TrainLoader`, without its guarantees.

    With another ``start_step``, rank, world size, worker count or micro-batch the samples are others.
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
        self._data, self._seed, self._world = data, seed, world_size
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
        """Epoch and offset by count alone."""
        return Stream(len(self._data), self._global_batch_size).position(self._step)


class _Images(IterableDataset[MicroBatch]):
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
        self._data, self._pipeline, self._key = data, pipeline, key
        self._micro, self._share, self._global_batch_size = micro, share, global_batch_size

    def __iter__(self) -> Iterator[MicroBatch]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        seed, step, rank, _ = self._key
        faults: list[str] = []
        samples, accum = self._samples(number, faults), self._share // self._micro
        taken = 0
        while True:
            images, labels, faults[:] = self._pipeline.empty_batch(self._micro), [], []
            for image in images:
                pixels, label = next(samples)
                taken += 1
                image.copy_(
                    self._pipeline.train_image(
                        pixels, rng_for(*self._key, number, taken, _PIXEL_KEY)
                    )
                )
                labels.append(label)
            done, part = divmod(number, accum)  # the loader takes the workers' batches in turn
            place = (
                (step + done) * self._global_batch_size + rank * self._share + part * self._micro
            )
            epochs = np.arange(place, place + self._micro) // len(self._data)
            yield MicroBatch(
                images, torch.tensor(labels), self._pipeline.mix(seed, epochs, place), tuple(faults)
            )
            number += workers

    def _samples(self, worker: int, faults: list[str]) -> Iterator[tuple[Any, int]]:
        import webdataset as wds

        def note(error: Exception) -> bool:
            return tell(f"{type(error).__name__}: {error}")

        def tell(fault: str) -> bool:
            faults.append(fault)
            if len(faults) > _HOPELESS:
                raise CorruptSampleError(
                    f"{_HOPELESS} faults in a row; the last: {faults[-1]}",
                    "look whether data.train names shards of images with labels in .cls",
                )
            return True

        # wds.utils.make_seed is not that of all versions: the key goes in as a number of our own.
        own = int(rng_for(*self._key, worker, _STREAM_KEY).integers(2**31))
        stream = wds.DataPipeline(
            wds.ResampledShards(self._data.shards(), worker_seed=lambda: own, deterministic=True),
            # nothing else is ever looked at, pickled members least of all
            wds.tarfile_to_samples(
                handler=note, select_files=lambda name: name.lower().endswith(_MEMBERS)
            ),
            wds.shuffle(_BUFFER, rng=random.Random(own)),
        )
        labels = LabelReader(None, self._data.classes)
        for sample in stream:
            where = f"sample {sample['__key__']} of {sample['__url__']}"
            images = [key for key in sample if key in EXTENSIONS]
            try:
                if len(images) != 1 or "cls" not in sample:
                    tell(f"{where}: one image and a .cls belong together")
                    continue
                label = labels.read("cls", sample["cls"])
                yield decode(sample[images[0]], self._pipeline.num_channels), label
            except SampleError as error:
                tell(f"{where} {error}")
            except UndecodableError as error:
                tell(f"{where}: no picture: {error}")


_MEMBERS = (".cls", *(f".{extension}" for extension in EXTENSIONS))
