"""What one host says of itself to `prelora preflight`: JSON lines, question by question, over ssh.

    python -m prelora_ds.hosts.hostcheck        (a question a line: {"ask": NAME, ...}; an answer a line)
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

from prelora_ds.hosts.check_in import make_of

DISK_BYTES = 8 << 20
MESSAGE_BYTES = 8 << 20
ROUNDS = 3


def facts(question: Mapping[str, Any]) -> dict[str, Any]:
    """All that can be said alone. ``token``: a file that the first host wrote; ``shards``: folders with a manifest."""
    import torch

    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as exc:
        address = f"unknown ({exc})"
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {"name": name, "address": address, "make": {**make_of(""), "platform": platform.machine()},
            "accelerators": cuda, "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(int(memory["MemAvailable"].split()[0]) / 2**20, 1),
            "disks": {path: disk(Path(path)) for path in question["disks"]},
            "shared": _read(Path(question["token"])),
            "shards": {path: shards(Path(path)) for path in question["shards"]},
            "interface": question["interface"] in (None, *(name for _, name in socket.if_nameindex())),
            "extensions": {op: extension(op) for op in question["extensions"]}}


def disk(folder: Path) -> dict[str, Any]:
    """Free GiB, and the seconds of writing 8 MiB to the disk itself."""
    try:
        free = shutil.disk_usage(folder).free
        begun = time.monotonic()
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight.") as file:
            file.write(os.urandom(DISK_BYTES))
            file.flush()
            os.fsync(file.fileno())
        return {"free_gib": round(free / 2**30, 2), "write_s": round(time.monotonic() - begun, 3)}
    except OSError as exc:
        return {"error": exc.strerror or str(exc)}


def shards(folder: Path) -> str:
    """The digest of the manifest, when its first and last shard can be read; else what is wrong."""
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
    """The folder of a compiled op of DeepSpeed, None where it is not built: a build in a run takes minutes a host."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    return next((str(path.parent) for path in root.rglob(f"{op}.so")), None)


def port(question: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the master's port is free here."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", question["port"]))
        except OSError as exc:
            return {"error": exc.strerror}
    return {}


def listen(question: Mapping[str, Any]) -> dict[str, Any]:
    """On the master: be there to be reached."""
    global _listener
    _listener = socket.create_server(("", question["port"]), backlog=1024)
    return {}


def reach(question: Mapping[str, Any]) -> dict[str, Any]:
    """Connect to the master."""
    try:
        with socket.create_connection((question["master"], question["port"]), timeout=question["limit_s"]):
            return {}
    except OSError as exc:
        return {"error": exc.strerror or str(exc)}


def all_reduce(question: Mapping[str, Any]) -> dict[str, Any]:
    """One rank a host: MB/s with each of two neighbours, and of an all-reduce over all."""
    import torch
    import torch.distributed as dist

    from prelora_ds.hosts.network import choose_interface

    if _listener is not None:
        _listener.close()
    choose_interface(question["interface"], question["master"], os.environ)
    cuda = torch.cuda.is_available()
    rank, world = question["rank"], question["world"]
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world,
                            init_method=f"tcp://{question['master']}:{question['port']}",
                            timeout=timedelta(seconds=question["limit_s"]))
    data = torch.ones(MESSAGE_BYTES // 4, device="cuda:0" if cuda else "cpu")
    rates: list[float] = []
    for shift in (0, 1):  # pairs (0 1)(2 3)... then (1 2)(3 4)...: a slow host is slow with both
        dist.barrier()
        place = (rank - shift) % world
        partner = (place ^ 1) if world % 2 == 0 else ((place ^ 1) if place < world - 1 else place)
        if partner != place and world > 1:
            other = (partner + shift) % world
            rates.append(_rate(partial(_swap, dist, data, other, place < partner), 2))
    dist.barrier()
    total = _rate(lambda: dist.all_reduce(data), 1)
    correct = torch.allclose(data, torch.full_like(data, float(world) ** (ROUNDS + 1)), rtol=1e-6)
    dist.destroy_process_group()
    return {"neighbours_mb_s": [round(rate, 1) for rate in rates], "all_reduce_mb_s": round(total, 1),
            "correct": correct}


def _swap(dist: Any, data: Any, other: int, first: bool) -> None:
    for sends in (first, not first):
        dist.send(data, other) if sends else dist.recv(data, other)


def _rate(act: Callable[[], object], messages: int) -> float:
    act()
    begun = time.monotonic()
    for _ in range(ROUNDS):
        act()
    return messages * ROUNDS * MESSAGE_BYTES / (time.monotonic() - begun) / 1e6


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


_listener: socket.socket | None = None
QUESTIONS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "clock": lambda question: {"time": time.time()}, "facts": facts, "port": port, "listen": listen, "reach": reach,
    "all_reduce": all_reduce}


def main() -> None:
    """Answer until the questions end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = QUESTIONS[question["ask"]](question)
        except Exception as exc:  # the host's answer is that it failed
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
