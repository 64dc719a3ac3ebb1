"""The part of `prelora preflight` that runs on each host, over ssh.

It reads questions from the standard input, one JSON object per line ({"ask": NAME, ...}), and
writes one answer per line:

    python -m prelora_ds.hosts.hostcheck
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from prelora_ds.accelerator import choose_accelerator, driver_version
from prelora_ds.hosts.installed import environment_fingerprint, installed_code

DISK_BYTES = 8 << 20
MESSAGE_BYTES = 8 << 20
GPU_MESSAGE_BYTES = 256 << 20  # a smaller message does not fill the adapters of a host with GPUs
ROUNDS = 3
_listener: socket.socket | None = None


def clock(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return the time of this host's clock."""
    return {"time": time.time()}


def facts(question: Mapping[str, Any]) -> dict[str, Any]:
    """Run the checks that need no other host.

    Raises ConfigError if this host has a GPU that torch cannot use.

    question: ``token``: a file that the first host wrote; ``disks``: folders to write to;
    ``shards``: folders with a manifest; ``interface``: launch.interface; ``extensions``: compiled
    ops of DeepSpeed.
    """
    import torch

    choose_accelerator()
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as exc:
        address = f"unknown ({exc})"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    memory = dict(line.split(":") for line in meminfo)
    interfaces = [interface for _, interface in socket.if_nameindex()]
    return {
        "name": name,
        "address": address,
        "make": {**environment_fingerprint("", installed_code()), "platform": platform.machine()},
        "accelerators": devices,
        "driver": driver_version(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory["MemAvailable"].split()[0]) / 2**20, 1),
        "disks": {path: disk(Path(path)) for path in question["disks"]},
        "shared": _read(Path(question["token"])),
        "shards": {path: shards(Path(path)) for path in question["shards"]},
        "interface": question["interface"] in (None, *interfaces),
        "extensions": {op: extension(op) for op in question["extensions"]},
    }


def disk(folder: Path) -> dict[str, Any]:
    """Return the free GiB, and the seconds to write and fsync 8 MiB."""
    try:
        free = shutil.disk_usage(folder).free
        begun = time.monotonic()
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight.") as file:
            file.write(os.urandom(DISK_BYTES))
            file.flush()
            os.fsync(file.fileno())
        write_s = time.monotonic() - begun
        return {"free_gib": round(free / 2**30, 2), "write_s": round(write_s, 3)}
    except OSError as exc:
        return {"error": exc.strerror or str(exc)}


def shards(folder: Path) -> str:
    """Return the number of samples if the first and last shard are readable, otherwise an error."""
    from prelora_ds.data.manifest import Manifest
    from prelora_ds.errors import ExpectedError

    try:
        manifest = Manifest.load(folder, key="shards")
        for shard in (manifest.shards[0], manifest.shards[-1]):
            with (folder / shard.name).open("rb") as file:
                file.read(4096)
        return f"{len(manifest)} samples"
    except (OSError, ExpectedError) as exc:
        return f"error: {exc}"


def extension(op: str) -> str | None:
    """Return the folder of a compiled op of DeepSpeed, or None if it is not built.

    Building it during a run takes minutes per host.
    """
    default = Path.home() / ".cache/torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)
    return next((str(path.parent) for path in root.rglob(f"{op}.so")), None)


def port(question: Mapping[str, Any]) -> dict[str, Any]:
    """Check that the master's port is free on this host."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", question["port"]))
        except OSError as exc:
            return {"error": exc.strerror}
    return {}


def listen(question: Mapping[str, Any]) -> dict[str, Any]:
    """Listen on the master's port."""
    global _listener
    _listener = socket.create_server(("", question["port"]), backlog=1024)
    return {}


def reach(question: Mapping[str, Any]) -> dict[str, Any]:
    """Connect to the master."""
    address = (question["master"], question["port"])
    try:
        with socket.create_connection(address, timeout=question["limit_s"]):
            return {}
    except OSError as exc:
        return {"error": exc.strerror or str(exc)}


def all_reduce(question: Mapping[str, Any]) -> dict[str, Any]:
    """Measure MB/s with two neighbours and for an all-reduce, with one rank per host. Collective.

    The pairs are (0 1)(2 3)..., then (1 2)(3 4)...: a slow host is slow with both neighbours. A rank uses the first GPU
    of its host, if there is one.
    """
    import torch
    import torch.distributed as dist

    from prelora_ds.hosts.network import choose_interface

    if _listener is not None:
        _listener.close()
    choose_interface(question["interface"], question["master"], os.environ)
    cuda = torch.cuda.is_available()
    rank = question["rank"]
    world = question["world"]
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world,
                            init_method=f"tcp://{question['master']}:{question['port']}",
                            timeout=timedelta(seconds=question["limit_s"]), device_id=device if cuda else None)
    data = torch.ones((GPU_MESSAGE_BYTES if cuda else MESSAGE_BYTES) // 4, device=device)
    rates: list[float] = []
    for shift in (0, 1):
        dist.barrier()
        position = (rank - shift) % world
        partner = _partner(position, world)
        if partner != position and world > 1:
            other = (partner + shift) % world
            rates.append(rate(partial(_swap, dist, data, other, position < partner), data, 2))
    dist.barrier()
    total = rate(lambda: dist.all_reduce(data), data, 1)
    expected = torch.full_like(data, float(world) ** (ROUNDS + 1))
    correct = torch.allclose(data, expected, rtol=1e-6)
    dist.destroy_process_group()
    return {"neighbours_mb_s": [round(rate, 1) for rate in rates],
            "all_reduce_mb_s": round(total, 1),
            "correct": correct}


def _partner(position: int, world: int) -> int:
    """Return the other one of the pair; in an odd world the last position has no partner."""
    if world % 2 == 1 and position == world - 1:
        return position
    return position ^ 1


def _swap(dist: Any, data: Any, other: int, first: bool) -> None:
    """Send ``data`` to ``other`` and receive its own; ``first``: whether to send first."""
    for sends in (first, not first):
        if sends:
            dist.send(data, other)
        else:
            dist.recv(data, other)


def rate(act: Callable[[], object], data: Any, messages: int) -> float:
    """Return the MB/s of ``act``, which transfers ``data`` ``messages`` times, after one warm-up.

    NCCL only queues a transfer, so the end of the queue is waited for.
    """
    act()
    _wait_for(data)
    begun = time.monotonic()
    for _ in range(ROUNDS):
        act()
    _wait_for(data)
    return float(messages * ROUNDS * data.nbytes / (time.monotonic() - begun) / 1e6)


def _wait_for(data: Any) -> None:
    """Wait until the last operation on ``data`` has ended."""
    data[-1:].tolist()


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


QUESTIONS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "clock": clock, "facts": facts, "port": port, "listen": listen, "reach": reach,
    "all_reduce": all_reduce}


def main() -> None:
    """Answer questions until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = QUESTIONS[question["ask"]](question)
        except Exception as exc:  # the failure is the host's answer
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
