"""One function over many jobs, in processes."""

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
    """/dev/shm, through which processes talk and workers pass batches, has no room."""

    of_one_rank = True
    others_may_meet_it = True

    @classmethod
    def now(cls, key: str, workers: int) -> NoSharedMemoryError:
        """That of this host, as it is now; ``key`` is the setting of the number of ``workers``."""
        try:
            found = os.statvfs(SHARED_MEMORY)
            sizes = (
                f"it has {found.f_blocks * found.f_frsize / 2**20:,.1f} MiB, of which "
                f"{found.f_bavail * found.f_frsize / 2**20:,.1f} are free"
            )
        except OSError as error:
            sizes = f"it cannot be used ({error.strerror})"
        fewer = (
            "take fewer data.workers, or none (data.workers=0), which need no room"
            if key == "data.workers"
            else f"give {key} 1, which needs no room"
        )
        return cls(
            key,
            workers,
            f"{SHARED_MEMORY}, the memory that processes share, has no room for them: {sizes}",
            "give it more (docker run --shm-size=16g, or --ipc=host; else "
            f"mount -o remount,size=16g {SHARED_MEMORY}), or {fewer}",
        )


def no_shared_memory(error: BaseException) -> bool:
    """Whether what could not be had is shared memory: of a lock or a queue, or of a tensor by torch."""
    if isinstance(error, OSError):  # of a semaphore, and so without a file
        return error.errno == errno.ENOSPC and error.filename is None
    return (
        isinstance(error, RuntimeError)
        and "/torch_" in str(error)
        and f"({errno.ENOSPC})" in str(error)
    )


class WorkerDiedError(ExpectedError, RuntimeError):
    """A worker process ended by itself, killed as a rule."""


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def end_with_parent(worker: int = 0) -> None:
    """In a worker: end with the process that has started it, even when that is killed.

    A worker would wait for its next job for ever: of a pool, because it holds the other end of its own
    queue, and of a fork server, because its parent is the fork server.
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
    """Results as they come, of ``workers`` processes; in this process, and in order, where that is 1.

    What ``function`` raises is raised here, and what has not begun by then never does. Raises WorkerDiedError.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    rest = iter(jobs)
    # A fresh process each: a fork would copy locks held by threads of torch or Arrow.
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    except OSError as error:
        if no_shared_memory(error):
            raise NoSharedMemoryError.now("--workers", workers) from error
        raise
    with pool:
        running: set[Future[Result]] = set()
        try:
            while True:
                running |= {
                    pool.submit(function, job) for job in islice(rest, 2 * workers - len(running))
                }
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise WorkerDiedError(
                "a worker process was killed (out of memory?); run the same command again, with "
                "fewer --workers if it was memory: what is written is kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
