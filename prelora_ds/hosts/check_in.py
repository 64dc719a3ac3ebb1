"""All ranks are counted before any collective waits for them: who is missing, there twice, or of another make is named.

The store of the roll call is the one that torch's process group then uses, as torchrun's is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prelora_ds.errors import (
    DIVERGED_EXIT_CODE,
    ConfigError,
    ExpectedError,
    LaunchError,
    RefusedError,
)
from prelora_ds.hosts.discovery import Ranks
from prelora_ds.hosts.network import is_mine

# What computes, and what makes the pixels.
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "prelora_ds", "torchvision", "numpy", "pillow", "simplejpeg")
POLL_S = 0.1
READ_S = 5.0  # rank 0 keeps the store open so long for the others to read a bad verdict
DECLINE_S = 20.0  # a rank that cannot begin tries so long to let the others know
_store: Any = None  # rank 0 serves it as long as it lives


@dataclass(frozen=True)
class Card:
    """What a rank says of itself; ``make`` is what has to be the same everywhere."""

    rank: int
    local_rank: int
    host: str
    make: Mapping[str, str]


def call_the_roll(ranks: Ranks, make: Mapping[str, str], environ: MutableMapping[str, str], timeout_s: float,
                  end: Callable[[LaunchError], None], launcher: int | None = None) -> list[str]:
    """Wait for every rank and compare; returns the host of each rank. Collective.

    launcher: the process that started this rank on its host, where one is known. Two ranks of one host
    that have different ones are of different jobs, and the one that is not rank 0's leaves.

    end: ends this process when torch's store itself hangs, as it does where something else listens at the port.

    Raises LaunchError when ranks are missing after ``timeout_s``, the master cannot be reached, or
    its port is taken, perhaps by another job's rank 0; ConfigError when a rank is there twice or a host
    has other versions, code or config; RefusedError when a rank could not begin (`declining`). All ranks raise alike.
    """
    global _store
    from torch.distributed import DistError

    here = socket.gethostname()
    if _serves(ranks, environ):
        check_master(ranks)
    where = f"MASTER_ADDR:MASTER_PORT = {ranks.master_addr}:{ranks.master_port}"
    remedy = "is this rank 0's address on the network that all hosts share? set MASTER_ADDR (deepspeed: --master_addr)"
    failed = f"{where}: host {here} (rank {ranks.rank}) did not get through to rank 0 in {timeout_s:g} s"
    lost = LaunchError(f"{failed}\n  remedy: {remedy}", blames=(0,))
    try:
        with _overdue(timeout_s, end, lost):
            _store = store = _open_store(ranks, environ, timeout_s)
        with _overdue(timeout_s, end, lost):  # anew: rank 0 may have begun later, and counts its own time
            prefix = _prefix(environ)
            _meet(store, ranks, here, launcher, timeout_s, prefix)
            verdict = _exchange(store, ranks, Card(ranks.rank, ranks.local_rank, here, make), timeout_s, prefix)
    except (DistError, RuntimeError) as exc:
        raise LaunchError(f"{failed}: {str(exc).splitlines()[0]}\n  remedy: {remedy}", blames=(0,)) from exc
    if verdict["refused"]:
        raise RefusedError(*verdict["refused"])
    if verdict["missing"]:
        raise LaunchError(*verdict["missing"])
    if verdict["mistake"]:
        raise ConfigError(*verdict["mistake"])
    environ.setdefault("TORCHELASTIC_RESTART_COUNT", "0")
    environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torch's process group joins this store
    return list(verdict["hosts"])


@contextmanager
def declining(ranks: Ranks, environ: Mapping[str, str]) -> Iterator[None]:
    """For what a rank checks by itself before the roll call.

    When that raises, the other ranks learn of it at the roll call and do not wait for this rank.
    That is tried for DECLINE_S seconds, and not at all while the master's address is unknown.
    """
    try:
        yield
    except Exception as error:
        if ranks.world_size > 1 and ranks.master_addr is not None:
            code = getattr(error, "exit_code", DIVERGED_EXIT_CODE)
            text = str(error)
            if not isinstance(error, ExpectedError):
                text = f"{type(error).__name__}: {text}"
            # In a thread: torch's store may hang where something else listens at the port.
            refused = [ranks.rank, socket.gethostname(), code, text]
            telling = threading.Thread(target=_decline, args=(ranks, environ, refused), daemon=True)
            telling.start()
            telling.join(DECLINE_S)
        raise


def _decline(ranks: Ranks, environ: Mapping[str, str], refused: list[Any]) -> None:
    """Rank 0 serves the store until the others have read the verdict or have declined, too."""
    prefix, others, deadline = _prefix(environ), ranks.world_size - 1, time.monotonic() + DECLINE_S
    with contextlib.suppress(RuntimeError):  # torch's DistError is one
        store = _open_store(ranks, environ, DECLINE_S)
        if ranks.rank != 0:
            store.set(f"{prefix}/refused", json.dumps(refused))
            store.add(f"{prefix}/declined", 1)
            return
        store.set(f"{prefix}/verdict", json.dumps(_verdict(refused=refused)))
        while time.monotonic() < deadline:
            if sum(store.add(f"{prefix}/{key}", 0) for key in ("read", "declined")) >= others:
                break
            time.sleep(POLL_S)


def _open_store(ranks: Ranks, environ: Mapping[str, str], timeout_s: float) -> Any:
    from torch.distributed import TCPStore

    assert ranks.master_addr is not None, "the master is found before it is reached"
    return TCPStore(ranks.master_addr, ranks.master_port, is_master=_serves(ranks, environ),
                    timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def _serves(ranks: Ranks, environ: Mapping[str, str]) -> bool:
    """Whether this rank is the one that listens: torchrun may do that itself."""
    return ranks.rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _prefix(environ: Mapping[str, str]) -> str:
    return f"roll/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _verdict(**found: Any) -> dict[str, Any]:
    return {"hosts": [], "refused": None, "missing": None, "mistake": None} | found


@contextmanager
def _overdue(timeout_s: float, end: Callable[[LaunchError], None], error: LaunchError) -> Iterator[None]:
    """Call ``end`` from a thread where the body hangs for longer than it says of itself."""
    timer = threading.Timer(timeout_s + 3 * READ_S, end, (error,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _meet(store: Any, ranks: Ranks, here: str, launcher: int | None, timeout_s: float, prefix: str) -> None:
    """Let no rank of another job into the roll: one that reached this store because of the same port.

    Raises LaunchError on that rank.
    """
    key = f"{prefix}/launcher"
    if ranks.rank == 0:
        store.set(key, json.dumps([here, launcher]))
        return
    deadline = time.monotonic() + timeout_s
    while not store.check([key]) and not store.check([f"{prefix}/verdict"]) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if store.check([key]):
        host, other = json.loads(store.get(key))
        if host == here and None not in (launcher, other) and launcher != other:
            raise LaunchError(f"MASTER_PORT = {ranks.master_port}: another job on this host, started by process "
                              f"{other}, uses it\n  remedy: choose another port (deepspeed: --master_port)")


def _exchange(store: Any, ranks: Ranks, card: Card, timeout_s: float, prefix: str) -> dict[str, Any]:
    """Hand in ``card``; rank 0 collects until all are there or time is up, and all get its verdict."""
    deadline = time.monotonic() + timeout_s
    verdict: dict[str, Any]
    store.set(f"{prefix}/card/{store.add(f'{prefix}/turns', 1)}", json.dumps(asdict(card)))
    if ranks.rank == 0:
        came, refused = 0, False
        while came < ranks.world_size and not refused and time.monotonic() < deadline:
            time.sleep(POLL_S)
            came, refused = store.add(f"{prefix}/turns", 0), store.check([f"{prefix}/refused"])
        if refused:
            verdict = _verdict(refused=json.loads(store.get(f"{prefix}/refused")))
        else:
            texts = [store.get(f"{prefix}/card/{turn}") for turn in range(1, came + 1)]
            cards = [Card(**json.loads(text)) for text in texts]
            verdict = verdict_on(cards, ranks.world_size, timeout_s)
        store.set(f"{prefix}/verdict", json.dumps(verdict))
    store.wait([f"{prefix}/verdict"], timedelta(seconds=timeout_s + 2 * READ_S))
    verdict = json.loads(store.get(f"{prefix}/verdict"))
    store.add(f"{prefix}/read", 1)
    if ranks.rank == 0:
        closing = time.monotonic() + READ_S
        while store.add(f"{prefix}/read", 0) < came and time.monotonic() < closing:
            time.sleep(POLL_S)
    return verdict


def verdict_on(cards: Sequence[Card], world_size: int, waited_s: float) -> dict[str, Any]:
    """The hosts by rank, and the parts of a LaunchError (``missing``) or of a ConfigError (``mistake``)."""
    verdict = _verdict()
    by_rank: dict[int, Card] = {}
    by_place: dict[tuple[str, int], Card] = {}
    for card in cards:
        twin = by_rank.setdefault(card.rank, card)
        if twin is not card:
            verdict["mistake"] = ("RANK", card.rank, f"there twice, on {twin.host} and on {card.host}",
                                  "start each rank once: one launcher, and each host once in its list")
            return verdict
        twin = by_place.setdefault((card.host, card.local_rank), card)
        if twin is not card:
            verdict["mistake"] = ("LOCAL_RANK", card.local_rank, f"ranks {twin.rank} and {card.rank} both have it on "
                                  f"host {card.host}", "let the launcher set LOCAL_RANK; two hosts need two names")
            return verdict
    absent = [rank for rank in range(world_size) if rank not in by_rank]
    if absent:
        hosts: dict[str, list[int]] = {}
        for rank in sorted(by_rank):
            hosts.setdefault(by_rank[rank].host, []).append(rank)
        came = "; ".join(f"{host}: {_spans(of)}" for host, of in hosts.items())
        verdict["missing"] = (f"ranks {_spans(absent)} of {world_size} did not come within {waited_s:g} s; there were "
                              f"{came}\n  remedy: look at the hosts that are not in this list "
                              "(`prelora preflight --hostfile ...`)", absent)
        return verdict
    first = by_rank[0]
    for rank in range(world_size):
        card = by_rank[rank]
        for key in sorted({*first.make, *card.make}):
            if first.make.get(key) != card.make.get(key):
                verdict["mistake"] = (key, card.make.get(key), f"on host {card.host} (rank {rank}); host {first.host} "
                                      f"has {first.make.get(key)!r}", "give all hosts the same installation and "
                                      "recipe; if these are of two jobs, give each job a port of its own")
                return verdict
    verdict["hosts"] = [by_rank[rank].host for rank in range(world_size)]
    return verdict


def check_master(ranks: Ranks) -> None:
    """Raise LaunchError when rank 0 cannot listen at its address: another host's, or a port in use."""
    assert ranks.master_addr is not None
    here = socket.gethostname()
    if not is_mine(ranks.master_addr):
        raise LaunchError(f"MASTER_ADDR = {ranks.master_addr!r}: does not belong to host {here}, where rank 0 runs\n"
                          "  remedy: set it to an address of that host (deepspeed: --master_addr)")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", ranks.master_port))
        except OSError as exc:
            raise LaunchError(f"MASTER_PORT = {ranks.master_port}: is in use on host {here} ({exc.strerror})\n"
                              "  remedy: choose another port (deepspeed: --master_port)") from exc


def make_of(config_text: str) -> dict[str, str]:
    """What has to be the same on every host: versions, the code of prelora_ds itself, and the resolved config."""
    make = {"python": platform.python_version(), "config": hashlib.sha256(config_text.encode()).hexdigest()[:12],
            "prelora_ds code": code_digest()}
    for package in PACKAGES:
        try:
            make[package] = version(package)
        except PackageNotFoundError:
            make[package] = "none"
    return make


def code_digest() -> str:
    """Of all Python files of the package, so that a host with another commit, or an edit, shows."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _spans(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2, 5``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
