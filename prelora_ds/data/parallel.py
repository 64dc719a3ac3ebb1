"""Calling one function on many jobs, in worker processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from prelora_ds.errors import ORPHAN_EXIT_CODE, ConfigError, ExpectedError

SHARED_MEMORY = "/dev/shm"
Job = TypeVar("Job")
Result = TypeVar("Result")


class NoSharedMemoryError(ConfigError):
    """/dev/shm, through which workers pass batches and processes share locks, has no room."""

    of_one_rank = True
    others_may_meet_it = True

    @classmethod
    def on_this_host(cls, key: str, workers: int) -> NoSharedMemoryError:
        """The error with the present sizes of /dev/shm on this host.

        ``key`` is the setting that holds the number of ``workers``.
        """
        try:
            sizes = os.statvfs(SHARED_MEMORY)
            size_mib = sizes.f_blocks * sizes.f_frsize / 2**20
            free_mib = sizes.f_bavail * sizes.f_frsize / 2**20
            state = f"it has {size_mib:,.1f} MiB, of which {free_mib:,.1f} are free"
        except OSError as error:
            state = f"it cannot be used ({error.strerror})"
        if key == "data.workers":
            fewer = "use fewer data.workers, or none (data.workers=0), which need no room"
        else:
            fewer = f"give {key} 1, which needs no room"
        return cls(
            key,
            workers,
            f"{SHARED_MEMORY}, the memory that processes share, has no room for them: {state}",
            "give it more (docker run --shm-size=16g, or --ipc=host; otherwise "
            f"mount -o remount,size=16g {SHARED_MEMORY}), or {fewer}",
        )


def no_shared_memory(error: BaseException) -> bool:
    """Return whether ``error`` means that shared memory is full.

    It may come from a lock or a queue of Python, or from a tensor of torch.
    """
    if isinstance(error, OSError):
        # The error of a semaphore names no file.
        return error.errno == errno.ENOSPC and error.filename is None
    return (
        isinstance(error, RuntimeError)
        and "/torch_" in str(error)
        and f"({errno.ENOSPC})" in str(error)
    )


class WorkerDiedError(ExpectedError, RuntimeError):
    """A worker process died, in most cases because it was killed."""


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def end_with_parent(worker: int = 0) -> None:
    """Make this worker end when the process that started it ends, even if that is killed.

    Otherwise the worker would wait forever for its next job: in a pool because it holds the other
    end of its own queue, and with a fork server because its parent is the fork server.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(ORPHAN_EXIT_CODE)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def map_unordered(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Iterator[Result]:
    """Yield the results of ``function`` as ``workers`` processes complete them.

    With one worker this process does the jobs, in order. An exception of ``function`` is raised
    here, and jobs that have not started by then are cancelled. Raises WorkerDiedError.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    remaining = iter(jobs)
    # Start fresh processes: a fork would copy locks held by threads of torch or Arrow.
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    except OSError as error:
        if no_shared_memory(error):
            raise NoSharedMemoryError.on_this_host("--workers", workers) from error
        raise
    with pool:
        running: set[Future[Result]] = set()
        try:
            while True:
                free = 2 * workers - len(running)
                running |= {pool.submit(function, job) for job in islice(remaining, free)}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise WorkerDiedError(
                "a worker process was killed (out of memory?); run the same command again, with "
                "fewer --workers if memory ran out: what is written is kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
