"""Rank processes for benchmarks: gloo or NCCL between them, and a pipe from each to the script."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from harness import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from support.pool import free_port


class Ranks:
    """``world`` processes that run ``function(pipe, *args)`` in one process group.

    The return value of the function is its last message. On a CPU each rank has one thread.

    function: a module-level function of a script.
    grouped: False for a function that creates the process group itself.
    """

    def __init__(
        self, function: Callable[..., Any], *args: Any, world: int = 2, grouped: bool = True
    ) -> None:
        from prelora_ds.accelerator import choose_accelerator

        os.environ["OMP_NUM_THREADS"] = "1"  # ranks share the cores of one machine
        choose_accelerator()
        pipes = [torch.multiprocessing.Pipe() for _ in range(world)]
        self._pipes = [mine for mine, _ in pipes]
        self._context = torch.multiprocessing.start_processes(
            _serve,
            (function, args, world, free_port(), grouped, [theirs for _, theirs in pipes]),
            nprocs=world,
            join=False,
            start_method="spawn",
            daemon=True,
        )
        for _, theirs in pipes:
            theirs.close()  # otherwise the exit of a rank would go unnoticed

    def send(self, message: Any) -> None:
        """Send ``message`` to all ranks. Raises the error of a rank."""
        self._each(lambda pipe: pipe.send(message))

    def gather(self) -> list[Any]:
        """Return the next message of each rank, by rank. Raises the error of a rank."""
        return self._each(lambda pipe: pipe.recv())

    def _each(self, act: Callable[[Connection], Any]) -> list[Any]:
        try:
            return [act(pipe) for pipe in self._pipes]
        except (EOFError, ConnectionError):  # a rank has exited: join raises its error
            self.join()
            raise

    def join(self) -> None:
        """Wait until all ranks have exited. Raises the error of a rank."""
        while not self._context.join():
            pass


def _serve(
    rank: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    world: int,
    port: int,
    grouped: bool,
    pipes: list[Connection],
) -> None:
    # Discard warnings and logs, which all ranks would print at once. Errors still reach the script.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    for other, pipe in enumerate(pipes):
        if other != rank:
            pipe.close()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if not torch.cuda.is_available():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
    from prelora_ds.engine.runtime import init_process_group

    if grouped:
        init_process_group()
    pipes[rank].send(function(pipes[rank], *args))
    if torch.distributed.is_initialized():  # one of our runs has already left it
        torch.distributed.destroy_process_group()
