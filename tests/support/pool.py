"""Real rank processes that stay alive between tests.

Each rank is a separate process, with gloo between them. On a CPU all are forked from one process, so that torch and
deepspeed are imported once. A function that fails or hangs ends the pool, and the next test gets a new one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import random
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any

from support.zygote import IMPORTS

TIMEOUT_S = 240.0


class RankFailure(AssertionError):
    """The error of a rank."""


class RankPool:
    """``world_size`` ranks, in which `run` calls a module-level function of a test file.

    environ: variables that the ranks have besides those of this process.
    """

    def __init__(self, world_size: int, environ: Mapping[str, str] = MappingProxyType({})) -> None:
        self.world_size = world_size
        context = multiprocessing.get_context("spawn")
        if os.environ.get("DS_ACCELERATOR") == "cpu":  # DeepSpeed chooses its accelerator when it is imported
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(list(IMPORTS))
        port = free_port()
        self._ranks = []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, world_size, port, dict(environ)), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append((process, mine))

    def run(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Call ``function(**arguments)`` in all ranks, and return the results by rank.

        Raises RankFailure with the traceback of a rank.
        """
        path = sys.modules[function.__module__].__file__
        for _, pipe in self._ranks:
            pipe.send((path, function.__name__, arguments))
        results: dict[Connection, Any] = {}
        while len(results) < self.world_size:
            pending = [pipe for _, pipe in self._ranks if pipe not in results]
            ready = wait(pending, timeout=TIMEOUT_S)
            if not ready:
                self.close()
                raise RankFailure(f"no answer from {len(pending)} ranks after {TIMEOUT_S:.0f} s")
            for pipe in ready:
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, "the rank's process died"
                if not ok:
                    rank = [p for _, p in self._ranks].index(pipe)  # type: ignore[arg-type]
                    self.close()
                    raise RankFailure(f"rank {rank}: {value}")
                results[pipe] = value  # type: ignore[index]
        return [results[pipe] for _, pipe in self._ranks]

    @property
    def alive(self) -> bool:
        """Whether all ranks run."""
        return all(process.is_alive() for process, _ in self._ranks)

    def close(self) -> None:
        """Kill the ranks."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
            process.join()


def free_port() -> int:
    """Return a free TCP port of the loopback interface.

    It is below 32768, where Linux begins to give ports to sockets that ask for none. A process group takes many of
    those, and could take this one before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(15000, 32768)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def _serve(pipe: Connection, rank: int, world_size: int, port: int, environ: dict[str, str]) -> None:
    os.environ |= environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    from prelora_ds.accelerator import choose_accelerator
    from prelora_ds.engine.runtime import init_process_group

    choose_accelerator()
    import torch

    torch.set_num_threads(1)
    init_process_group()
    while True:
        try:
            path, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(_module(path), name)(**arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _module(path: str) -> Any:
    from prelora_ds.engine.runtime import freeze_imports

    name = f"_ranks_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        import prelora_ds.train  # noqa: F401 (imports everything that a run imports)

        freeze_imports()
    return sys.modules[name]
