"""One function over many jobs, in processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from prelora_ds.errors import ORPHAN_EXIT_CODE, ExpectedError

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerDiedError(ExpectedError, RuntimeError):
    """A worker process ended by itself, killed as a rule."""


def cores() -> int:
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


def unordered(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """Results as they come, of ``workers`` processes; in this process, and in order, where that is 1.

    What ``function`` raises is raised here, and what has not begun by then never does. Raises WorkerDiedError.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    rest = iter(jobs)
    # A fresh process each: a fork would copy locks held by threads of torch or Arrow.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        running: set[Future[Result]] = set()
        try:
            while True:
                running |= {pool.submit(function, job) for job in islice(rest, 2 * workers - len(running))}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise WorkerDiedError("a worker process was killed (out of memory?); run the same command again, with "
                                  "fewer --workers if it was memory: what is written is kept") from error
        finally:
            pool.shutdown(cancel_futures=True)
