"""Worker processes that make batches, and the one message that reports how a worker failed."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from prelora_ds.data.datasets import identity
from prelora_ds.data.parallel import NoSharedMemoryError, end_with_parent, no_shared_memory
from prelora_ds.errors import ExpectedError

WorkerStart = Literal["forkserver", "spawn", "fork"]
_PRELOAD = "prelora_ds.data.loader"  # imports whatever a worker needs
_WORKER_ENDS_S = 5.0
_REMEDY = "\n  remedy: if memory ran out, lower data.workers or train.micro_batch_size"


class WorkerLostError(ExpectedError, RuntimeError):
    """A worker process died before its work was done."""

    of_one_rank = True


class Workers:
    """An iterator over batches, one per key and in the order of the keys.

    ``count`` processes make the batches; with 0 this process makes them. The processes end when
    this object is closed or dropped. ``keys`` is None for a data set that has its own order.

    Iterating raises whatever the data set raises, and WorkerLostError.
    """

    def __init__(
        self, dataset: Dataset[Any], keys: Iterable[Any] | None, count: int, start: WorkerStart
    ) -> None:
        self._count = count
        self._batches: Iterator[Any]
        try:
            if count == 0:
                self._batches = _in_process(dataset, keys)
            else:
                self._batches = iter(_data_loader(dataset, keys, count, start))
        except OSError as error:
            if no_shared_memory(error):
                _abandon_half_made_iterator(error)
                raise NoSharedMemoryError.on_this_host("data.workers", count) from error
            raise

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
            if isinstance(batch, _Failure):
                raise batch.error or NoSharedMemoryError.on_this_host("data.workers", self._count)
            return batch
        except ExpectedError:
            raise
        except (RuntimeError, OSError, EOFError) as error:
            # DataLoader raises RuntimeError for a dead worker, or OSError if it died while sending.
            reported = isinstance(error, RuntimeError)
            if reported and not str(error).startswith("DataLoader worker"):
                raise
            # A worker gets SIGBUS when it touches a page that /dev/shm has no room for.
            if "Bus error" in str(error):
                raise NoSharedMemoryError.on_this_host("data.workers", self._count) from error
            workers = getattr(self._batches, "_workers", [])
            sentinels = [worker.sentinel for worker in workers]
            multiprocessing.connection.wait(sentinels, _WORKER_ENDS_S)
            exit_codes = {
                worker.pid: worker.exitcode for worker in workers if worker.exitcode is not None
            }
            if not reported and not exit_codes:
                raise
            raise WorkerLostError(
                f"a data worker died (process: exit code {exit_codes}; "
                f"{type(error).__name__}: {error}){_REMEDY}; otherwise check the system log"
            ) from error

    def close(self) -> None:
        self._batches = iter(())


def _abandon_half_made_iterator(error: OSError) -> None:
    """End the workers of the iterator whose construction failed with ``error``.

    It is also marked as shut down: its destructor would print an error otherwise.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        iterator = frame.f_locals.get("self")
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown = True
            for worker in getattr(iterator, "_workers", ()):
                worker.terminate()


@dataclass(frozen=True)
class _Failure:
    """An error that a worker sends in place of a batch; DataLoader would print 35 lines for it.

    ``error`` is None if there was no shared memory for the batch.
    """

    error: ExpectedError | None


class _WorkerDataset(Dataset[Any]):
    """A data set in a worker: it returns expected errors as `_Failure`."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, keys: Any) -> Any:
        try:
            return _in_shared_memory(self._dataset.__getitems__(keys))
        except ExpectedError as error:
            return _Failure(error)
        except RuntimeError as error:
            if no_shared_memory(error):
                return _Failure(None)
            raise
        except MemoryError as error:
            problem = f"a data worker asked for more memory than there is ({error})"
            return _Failure(WorkerLostError(problem + _REMEDY))


class _WorkerStream(IterableDataset[Any]):
    """The counterpart of `_WorkerDataset` for a data set that has its own order."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from map(_in_shared_memory, self._dataset)
        except ExpectedError as error:
            yield _Failure(error)
        except RuntimeError as error:
            if not no_shared_memory(error):
                raise
            yield _Failure(None)


def _in_shared_memory(batch: Any) -> Any:
    """Move all tensors of ``batch`` to shared memory and return it.

    The thread that sends a batch would do this too, but it could not report a lack of memory.
    """
    for part in batch if isinstance(batch, tuple) else ():
        if isinstance(part, Tensor):
            part.share_memory_()
    return batch


def _data_loader(
    dataset: Dataset[Any], keys: Iterable[Any] | None, count: int, start: WorkerStart
) -> DataLoader[Any]:
    # A fork of this process would copy locks of gloo and OpenMP without the threads that release
    # them. The fork server is a clean process that imports torch once; the workers are its forks
    # (DataLoader gives each of them one thread).
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload([_PRELOAD])
    return DataLoader(
        _WorkerStream(dataset) if keys is None else _WorkerDataset(dataset),
        **({"batch_size": None} if keys is None else {"batch_sampler": keys}),
        collate_fn=identity,
        num_workers=count,
        multiprocessing_context=context,
        pin_memory=torch.cuda.is_available(),
        # The watchdog of torch 2.14 watches a worker's parent, and that is the fork server.
        worker_init_fn=end_with_parent,
        # DataLoader would draw from the global generator: dropout would depend on the workers.
        generator=torch.Generator(),
    )


def _in_process(dataset: Any, keys: Iterable[Any] | None) -> Iterator[Any]:
    batches = iter(dataset) if keys is None else map(dataset.__getitems__, keys)
    while True:
        threads = torch.get_num_threads()
        # One image is too small to parallelise: two threads on two busy cores were 15 times slower.
        torch.set_num_threads(1)
        try:
            batch = next(batches)
        except StopIteration:
            return
        finally:
            torch.set_num_threads(threads)
        yield batch
