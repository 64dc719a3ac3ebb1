"""Batches for training and evaluation: decoded and cropped here, by worker processes, and sent as uint8.

What a rank gets depends on seed, step and world size alone; how many workers make it changes nothing.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from prelora_ds.data.batch import MicroBatch
from prelora_ds.data.cache import CacheFiller, ShardCache
from prelora_ds.data.datasets import (
    PADDING,
    BatchRows,
    EvalImages,
    ImagePipeline,
    TrainImages,
    identity,
)
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.order import Position, Stream, Tail
from prelora_ds.data.parallel import NoSharedMemoryError, end_with_parent, no_shared_memory
from prelora_ds.data.store import SampleStore
from prelora_ds.errors import ConfigError, ExpectedError

WorkerStart = Literal["forkserver", "spawn", "fork"]
_FAULTS_SAID = 20
_WORKER_ENDS_S = 5.0
_REMEDY = "\n  remedy: where memory ran out, fewer data.workers or a smaller train.micro_batch_size"


class WorkerLostError(ExpectedError, RuntimeError):
    """A worker process that ended before its work was done."""

    of_one_rank = True


class Workers:
    """A batch for each key, in their order, made by ``count`` processes that end when this is closed or dropped.

    0 makes them here. ``keys`` None is for a data set that has its own order. Raises what the data set raises, and
    WorkerLostError.
    """

    def __init__(
        self, dataset: Dataset[Any], keys: Iterable[Any] | None, count: int, start: WorkerStart
    ) -> None:
        self._count = count
        try:
            self._batches = (
                _in_process(dataset, keys)
                if count == 0
                else iter(_loader(dataset, keys, count, start))
            )
        except OSError as error:
            if no_shared_memory(error):
                _quieten(error)
                raise NoSharedMemoryError.now("data.workers", count) from error
            raise

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
            if isinstance(batch, _Failure):
                raise batch.error or NoSharedMemoryError.now("data.workers", self._count)
            return batch
        except ExpectedError:
            raise
        except (RuntimeError, OSError, EOFError) as error:
            # DataLoader says so itself, unless the worker died in the middle of a message: that is an OSError.
            said = isinstance(error, RuntimeError)
            if said and not str(error).startswith("DataLoader worker"):
                raise
            if "Bus error" in str(
                error
            ):  # what a page that /dev/shm cannot give ends a worker with
                raise NoSharedMemoryError.now("data.workers", self._count) from error
            workers = getattr(self._batches, "_workers", [])
            multiprocessing.connection.wait([worker.sentinel for worker in workers], _WORKER_ENDS_S)
            gone = {
                worker.pid: worker.exitcode for worker in workers if worker.exitcode is not None
            }
            if not said and not gone:
                raise
            raise WorkerLostError(
                f"a data worker is gone (process: exit code {gone}; {type(error).__name__}: {error})"
                f"{_REMEDY}; else look into the system's log"
            ) from error

    def close(self) -> None:
        self._batches = iter(())


def _quieten(error: OSError) -> None:
    """End what there is of the iterator that ``error`` left half made: its destructor would complain."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        half = frame.f_locals.get("self")
        if isinstance(half, _MultiProcessingDataLoaderIter):
            half._shutdown = True
            for worker in getattr(half, "_workers", ()):
                worker.terminate()


@dataclass(frozen=True)
class _Failure:
    """An error of a worker in the place of a batch: DataLoader would make 35 lines out of it.

    None: there was no shared memory for the batch.
    """

    error: ExpectedError | None


class _Telling(Dataset[Any]):
    """``dataset`` in a worker."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, keys: Any) -> Any:
        try:
            return _shared(self._dataset.__getitems__(keys))
        except ExpectedError as error:
            return _Failure(error)
        except RuntimeError as error:
            if no_shared_memory(error):
                return _Failure(None)
            raise
        except MemoryError as error:
            problem = f"a data worker asked for more memory than there is ({error})"
            return _Failure(WorkerLostError(problem + _REMEDY))


class _TellingStream(IterableDataset[Any]):
    """The same for a data set that has its own order."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from map(_shared, self._dataset)
        except ExpectedError as error:
            yield _Failure(error)
        except RuntimeError as error:
            if not no_shared_memory(error):
                raise
            yield _Failure(None)


def _shared(batch: Any) -> Any:
    """``batch`` with all its tensors in shared memory: where there is none, the thread that sends it could not tell."""
    for part in batch if isinstance(batch, tuple) else ():
        if isinstance(part, Tensor):
            part.share_memory_()
    return batch


def _loader(
    dataset: Dataset[Any], keys: Iterable[Any] | None, count: int, start: WorkerStart
) -> DataLoader[Any]:
    # A fork of this process would copy gloo's and OpenMP's locks without the threads that release them. The fork server
    # is a clean process; it imports torch once, and its forks are the workers (of one thread each, by DataLoader).
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload([__name__])
    return DataLoader(
        _TellingStream(dataset) if keys is None else _Telling(dataset),
        **({"batch_size": None} if keys is None else {"batch_sampler": keys}),
        collate_fn=identity,
        num_workers=count,
        multiprocessing_context=context,
        pin_memory=torch.cuda.is_available(),
        # The watchdog of torch 2.14 looks at a worker's parent, and that is the fork server.
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),  # else it draws from the global generator, and dropout would depend on workers
    )


def _in_process(dataset: Any, keys: Iterable[Any] | None) -> Iterator[Any]:
    batches = iter(dataset) if keys is None else map(dataset.__getitems__, keys)
    while True:
        threads = torch.get_num_threads()
        torch.set_num_threads(
            1
        )  # an image is too little to share: on two busy cores, two threads were 15 times slower
        try:
            batch = next(batches)
        except StopIteration:
            return
        finally:
            torch.set_num_threads(threads)
        yield batch


class Loader(ABC):
    """A rank's micro-batches, step after step; what they are made of is for `_open` to say.

    waited_s: seconds that the last `next` took.

    With workers, the program's entry needs its ``if __name__ == "__main__"``.
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
        self._pipeline, self._rank, self._global_batch_size, self._share = (
            pipeline,
            rank,
            global_batch_size,
            share,
        )
        self._micro, self._workers, self._worker_start, self._step = (
            micro_batch_size,
            workers,
            worker_start,
            step,
        )
        self._said, self.waited_s = 0, 0.0
        self._batches: Workers | None = self._open()

    @abstractmethod
    def _open(self) -> Workers:
        """The micro-batches of ``_micro`` rows from ``_step`` on."""

    @property
    @abstractmethod
    def state(self) -> Position:
        """Where the next batch begins."""

    @property
    def step(self) -> int:
        """The optimizer step whose batch `next` returns; with ``start_step``, a new loader goes on from here."""
        return self._step

    def rebatch(self, micro_batch_size: int) -> None:
        """Cut this and all later steps' rows into micro-batches of another size.

        Raises ValueError when it does not divide the rank's share of the global batch, or would cut a pair.
        """
        if self._share % micro_batch_size or (self._pipeline.mixes and micro_batch_size % 2):
            raise ValueError(
                f"{self._share} rows a rank and step are no multiple of {micro_batch_size}, or it is odd "
                "and pairs are mixed"
            )
        if self._micro != micro_batch_size:
            self._batches = None  # ends the workers
            self._micro = micro_batch_size
            self._batches = self._open()

    def next(self) -> list[MicroBatch]:
        """The step's micro-batches.

        A sample that cannot be read is named on stderr and in `MicroBatch.faults`, and has another in its place.
        Raises CorruptSampleError where there is no other, WorkerLostError, and ValueError on a closed loader; after
        the first two it is closed.
        """
        if self._batches is None:
            raise ValueError("the loader is closed")
        begun = time.perf_counter()
        try:
            micro_batches = [next(self._batches) for _ in range(self._share // self._micro)]
        except Exception:
            self.close()  # part of the step is consumed, and the next call would give a shifted batch
            raise
        self._step += 1
        self.waited_s = time.perf_counter() - begun
        for fault in (fault for batch in micro_batches for fault in batch.faults):
            if self._said < _FAULTS_SAID:
                print(
                    f"warning (rank {self._rank}, step {self._step}): {fault}",
                    file=sys.stderr,
                    flush=True,
                )
            self._said += 1
        return micro_batches

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        self._batches = None


class TrainLoader(Loader):
    """This rank's part of the global batches of a manifest, from ``start_step`` on.

    Rank r owns the rows r*G/W to (r+1)*G/W of a global batch; micro-batch j is the j-th slice of these. Raises
    ConfigError when the global batch is no multiple of micro-batch x ranks, or when pairs are mixed and the micro-batch
    is odd, ValueError for a rank outside of the world.
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
        self.stream, self._seed = Stream(len(manifest), global_batch_size, tail), seed
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
        self._stager = None if cache is None else CacheFiller(manifest, cache)

    def _open(self) -> Workers:
        return Workers(self._images, self._rows(self._step), self._workers, self._worker_start)

    def _rows(self, start_step: int) -> Iterator[BatchRows]:
        """The rows of this rank's micro-batches from ``start_step`` on, without end."""
        micro, first_owned = self._micro, self._rank * self._share
        for step in count(start_step):
            rows = self.stream.batch(self._seed, step)
            for first in range(first_owned, first_owned + self._share, micro):
                epochs, samples = rows[first : first + micro].T.copy()
                yield BatchRows(epochs, samples, step * self._global_batch_size + first)

    @property
    def state(self) -> Position:
        """Where the next batch begins: `Stream.step_at` gives its step, and any world size goes on there."""
        return self.stream.position(self._step)

    def close(self) -> None:
        """End the workers, stop copying and close the shards; a second call does nothing."""
        super().close()
        self._images.store.close()
        if self._stager is not None:
            self._stager.close()


def rank_share(
    rank: int,
    world_size: int,
    global_batch_size: int,
    micro_batch_size: int,
    pipeline: ImagePipeline,
) -> int:
    """A rank's rows of a global batch. Raises ConfigError and ValueError as `TrainLoader` does."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    if global_batch_size % (micro_batch_size * world_size):
        raise ConfigError(
            "train.global_batch_size",
            global_batch_size,
            f"no multiple of train.micro_batch_size {micro_batch_size} x {world_size} ranks",
            f"use a multiple of {micro_batch_size * world_size}",
        )
    if pipeline.mixes and micro_batch_size % 2:
        raise ConfigError(
            "train.micro_batch_size",
            micro_batch_size,
            "odd, and Mixup and CutMix need whole pairs",
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
    """(images uint8 [B, C, S, S], labels int64 [B], mask bool [B]) over this rank's contiguous share of the samples.

    Every rank gets the same number of batches of exactly ``batch_size`` rows; where samples run out, images are black
    and the mask is False. True masks over all ranks count every sample once. Raises CorruptSampleError: an exact count
    has no room for another sample. Raises ValueError for a rank outside of the world.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    share = -(-len(manifest) // world_size)
    start, stop = min(rank * share, len(manifest)), min((rank + 1) * share, len(manifest))
    rows = -(-share // batch_size) * batch_size
    samples = [*range(start, stop), *[PADDING] * (rows - (stop - start))]
    dataset = EvalImages(SampleStore(manifest), pipeline)
    batches = Workers(
        dataset,
        [samples[i : i + batch_size] for i in range(0, rows, batch_size)],
        workers,
        worker_start,
    )
    try:
        yield from batches
    finally:
        batches.close()
        dataset.store.close()
