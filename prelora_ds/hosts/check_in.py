"""All ranks check in with rank 0 before the first collective.

Ranks that are missing, started twice or have a different installation are named with their host.
One rank of each host reads what is the same for all ranks of that host, and the others get it from that rank.
The store of the check-in is the one that torch's process group then uses.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
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

POLL_S = 0.1
READ_S = 5.0  # how long rank 0 keeps the store open for the others to read a failed verdict
DECLINE_S = 20.0  # how long a rank that cannot start tries to tell the others
_store: Any = None  # rank 0 serves it for its lifetime


@dataclass(frozen=True)
class RankInfo:
    """What a rank reports when it checks in; ``fingerprint`` must be the same on all ranks.

    gpu: the address of the rank's GPU on its host; empty without one.
    """

    rank: int
    local_rank: int
    host: str
    fingerprint: Mapping[str, str]
    gpu: str = ""


def examines_host(ranks: Ranks) -> bool:
    """Whether this rank reads what is the same for all ranks of its host: data, code and installed packages.

    Rank 0 reads it as well if it is not the first rank of its host, because it claims the output folder before it
    serves the store.
    """
    return 0 in (ranks.rank, ranks.local_rank)


class CheckIn:
    """This rank's place in the store in which all ranks meet, and which rank 0 serves.

    launcher: the process that started this rank on its host, if known. Two ranks of one host with
    different launchers belong to different jobs; the one that is not rank 0 leaves.

    give_up: called to end this process when torch's store itself hangs, which happens when another
    program listens on the port.

    Raises LaunchError when the master is unreachable, or its port is in use, perhaps by another job's rank 0.
    """

    def __init__(self, ranks: Ranks, environ: MutableMapping[str, str], timeout_s: float,
                 give_up: Callable[[LaunchError], None], launcher: int | None = None) -> None:
        global _store
        self._ranks, self._environ, self._timeout_s = ranks, environ, timeout_s
        self._prefix = _prefix(environ)
        self._here = socket.gethostname()
        self._give_up = give_up
        self._master = f"MASTER_ADDR:MASTER_PORT = {ranks.master_addr}:{ranks.master_port}"
        if _serves_store(ranks, environ):
            check_master(ranks)
        with self._reaching_rank_0():
            _store = self._store = _open_store(ranks, environ, timeout_s)
        # A new limit: rank 0 may have started later, and its own time counts.
        with self._reaching_rank_0():
            _leave_other_job(self._store, ranks, self._here, launcher, timeout_s, self._prefix)

    def publish(self, facts: object) -> None:
        """Give the other ranks of this host the ``facts`` that this rank has read. They are pickled."""
        with self._reaching_rank_0():
            self._store.set(self._facts_key, zlib.compress(pickle.dumps(facts)))

    def facts_of_host(self) -> Any:
        """Wait until a rank of this host has published what it has read, and return that.

        Raises what `meet` raises when ranks are missing or one of them could not start.
        """
        with self._reaching_rank_0():
            deadline = time.monotonic() + self._timeout_s
            verdict = f"{self._prefix}/verdict"
            while not self._store.check([self._facts_key]):
                if self._store.check([verdict]):
                    self._store.add(f"{self._prefix}/read", 1)
                    _raise_verdict(json.loads(self._store.get(verdict)))
                if time.monotonic() >= deadline:
                    raise LaunchError(
                        f"host {self._here}: its rank with LOCAL_RANK = 0 has not reported the data within "
                        f"{self._timeout_s:g} s to rank {self._ranks.rank}\n"
                        "  remedy: look for an error of that rank; let the launcher count LOCAL_RANK from 0")
                time.sleep(POLL_S)
            return pickle.loads(zlib.decompress(self._store.get(self._facts_key)))

    def meet(self, fingerprint: Mapping[str, str], gpu: str = "") -> list[str]:
        """Wait for every rank and compare them; returns the host of each rank. Collective.

        gpu: see `RankInfo`.

        All ranks raise the same error:

        - LaunchError when ranks are missing after the timeout.
        - ConfigError when a rank was started twice, two ranks use one GPU, or a host has another accelerator, other
          versions, code or config.
        - RefusedError when a rank could not start (`announcing_failure`).
        """
        info = RankInfo(self._ranks.rank, self._ranks.local_rank, self._here, fingerprint, gpu)
        with self._reaching_rank_0():
            verdict = _exchange(self._store, self._ranks, info, self._timeout_s, self._prefix)
        _raise_verdict(verdict)
        self._environ.setdefault("TORCHELASTIC_RESTART_COUNT", "0")
        self._environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torch's process group joins this store
        return list(verdict["hosts"])

    @property
    def _facts_key(self) -> str:
        return f"{self._prefix}/host/{self._here}"

    @contextmanager
    def _reaching_rank_0(self) -> Iterator[None]:
        """Raise LaunchError if the store cannot be reached in the body, and give up if it hangs."""
        from torch.distributed import DistError

        problem = (f"{self._master}: host {self._here} (rank {self._ranks.rank}) could not reach rank 0 "
                   f"within {self._timeout_s:g} s")
        remedy = ("set MASTER_ADDR (deepspeed: --master_addr) to rank 0's address on the network that "
                  "all hosts share")
        unreachable = LaunchError(f"{problem}\n  remedy: {remedy}", blames=(0,))
        try:
            with _time_limit(self._timeout_s, self._give_up, unreachable):
                yield
        except ExpectedError:
            raise
        except (DistError, RuntimeError) as exc:
            reason = str(exc).splitlines()[0]
            raise LaunchError(f"{problem}: {reason}\n  remedy: {remedy}", blames=(0,)) from exc


def _raise_verdict(verdict: Mapping[str, Any]) -> None:
    """Raise the error of a verdict, if it is one."""
    if verdict["refused"]:
        raise RefusedError(*verdict["refused"])
    if verdict["missing"]:
        raise LaunchError(*verdict["missing"])
    if verdict["mistake"]:
        raise ConfigError(*verdict["mistake"])


@contextmanager
def announcing_failure(ranks: Ranks, environ: Mapping[str, str]) -> Iterator[None]:
    """Tell the other ranks when the body raises, so that they do not wait for this rank.

    The body is what a rank checks before the check-in. The others learn of the failure when they
    check in. The attempt lasts at most DECLINE_S seconds, and is not made while the master's
    address is unknown. The exception is raised again.
    """
    try:
        yield
    except Exception as error:
        if ranks.world_size > 1 and ranks.master_addr is not None:
            code = getattr(error, "exit_code", DIVERGED_EXIT_CODE)
            text = str(error)
            if not isinstance(error, ExpectedError):
                text = f"{type(error).__name__}: {text}"
            refused = [ranks.rank, socket.gethostname(), code, text]
            # In a thread: torch's store may hang when another program listens on the port.
            thread = threading.Thread(target=_decline, args=(ranks, environ, refused), daemon=True)
            thread.start()
            thread.join(DECLINE_S)
        raise


def _decline(ranks: Ranks, environ: Mapping[str, str], refused: list[Any]) -> None:
    """Publish ``refused``; rank 0 then serves the store until the others read it or declined."""
    prefix = _prefix(environ)
    others = ranks.world_size - 1
    deadline = time.monotonic() + DECLINE_S
    with contextlib.suppress(RuntimeError):  # includes torch's DistError
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

    assert ranks.master_addr is not None, "the master is determined before it is contacted"
    return TCPStore(ranks.master_addr, ranks.master_port, is_master=_serves_store(ranks, environ),
                    timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def _serves_store(ranks: Ranks, environ: Mapping[str, str]) -> bool:
    """Whether this rank listens on the master's port; torchrun may do that itself."""
    return ranks.rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _prefix(environ: Mapping[str, str]) -> str:
    return f"roll/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _verdict(**entries: Any) -> dict[str, Any]:
    return {"hosts": [], "refused": None, "missing": None, "mistake": None} | entries


@contextmanager
def _time_limit(timeout_s: float, give_up: Callable[[LaunchError], None],
                error: LaunchError) -> Iterator[None]:
    """Call ``give_up(error)`` from a timer thread if the body exceeds its own timeout."""
    timer = threading.Timer(timeout_s + 3 * READ_S, give_up, (error,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave_other_job(store: Any, ranks: Ranks, here: str, launcher: int | None, timeout_s: float,
                     prefix: str) -> None:
    """Raise LaunchError on a rank that reached another job's store because both use one port."""
    key = f"{prefix}/launcher"
    if ranks.rank == 0:
        store.set(key, json.dumps([here, launcher]))
        return
    deadline = time.monotonic() + timeout_s
    while not store.check([key]) and not store.check([f"{prefix}/verdict"]):
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL_S)
    if not store.check([key]):
        return
    host, other = json.loads(store.get(key))
    if host == here and None not in (launcher, other) and launcher != other:
        raise LaunchError(f"MASTER_PORT = {ranks.master_port}: is used by another job on this "
                          f"host, started by process {other}\n"
                          "  remedy: choose another port (deepspeed: --master_port)")


def _exchange(store: Any, ranks: Ranks, info: RankInfo, timeout_s: float,
              prefix: str) -> dict[str, Any]:
    """Submit ``info`` and return rank 0's verdict.

    Rank 0 collects until all ranks are present, one was refused, or the time is up.
    """
    deadline = time.monotonic() + timeout_s
    verdict: dict[str, Any]
    turn = store.add(f"{prefix}/turns", 1)
    store.set(f"{prefix}/card/{turn}", json.dumps(asdict(info)))
    if ranks.rank == 0:
        present = 0
        refused = False
        while present < ranks.world_size and not refused and time.monotonic() < deadline:
            time.sleep(POLL_S)
            present = store.add(f"{prefix}/turns", 0)
            refused = store.check([f"{prefix}/refused"])
        if refused:
            verdict = _verdict(refused=json.loads(store.get(f"{prefix}/refused")))
        else:
            texts = [store.get(f"{prefix}/card/{turn}") for turn in range(1, present + 1)]
            infos = [RankInfo(**json.loads(text)) for text in texts]
            verdict = verdict_on(infos, ranks.world_size, timeout_s)
        store.set(f"{prefix}/verdict", json.dumps(verdict))
    store.wait([f"{prefix}/verdict"], timedelta(seconds=timeout_s + 2 * READ_S))
    verdict = json.loads(store.get(f"{prefix}/verdict"))
    store.add(f"{prefix}/read", 1)
    if ranks.rank == 0:
        closing = time.monotonic() + READ_S
        while store.add(f"{prefix}/read", 0) < present and time.monotonic() < closing:
            time.sleep(POLL_S)
    return verdict


def verdict_on(infos: Sequence[RankInfo], world_size: int, waited_s: float) -> dict[str, Any]:
    """Return the hosts by rank, or the arguments of an error.

    The arguments are those of a LaunchError (``missing``) or of a ConfigError (``mistake``).
    """
    by_rank: dict[int, RankInfo] = {}
    by_local_rank: dict[tuple[str, int], RankInfo] = {}
    by_gpu: dict[tuple[str, str], RankInfo] = {}
    for info in infos:
        twin = by_rank.setdefault(info.rank, info)
        if twin is not info:
            return _verdict(mistake=(
                "RANK", info.rank, f"started twice, on {twin.host} and {info.host}",
                "start each rank once: use one launcher, and list each host once"))
        twin = by_local_rank.setdefault((info.host, info.local_rank), info)
        if twin is not info:
            return _verdict(mistake=(
                "LOCAL_RANK", info.local_rank,
                f"used by ranks {twin.rank} and {info.rank} on host {info.host}",
                "let the launcher set LOCAL_RANK; hosts need distinct names"))
        twin = by_gpu.setdefault((info.host, info.gpu), info)
        if info.gpu and twin is not info:
            return _verdict(mistake=(
                "GPU", info.gpu, f"used by ranks {twin.rank} and {info.rank} on host {info.host}",
                "start at most as many ranks per host as it has GPUs; a launcher that shows each rank one GPU has to "
                "show each rank another one"))

    missing = [rank for rank in range(world_size) if rank not in by_rank]
    if missing:
        ranks_by_host: dict[str, list[int]] = {}
        for rank in sorted(by_rank):
            ranks_by_host.setdefault(by_rank[rank].host, []).append(rank)
        present = "; ".join(f"{host}: {_spans(ranks)}" for host, ranks in ranks_by_host.items())
        return _verdict(missing=(
            f"ranks {_spans(missing)} of {world_size} did not check in within {waited_s:g} s; "
            f"present: {present}\n  remedy: check the hosts that are not in this list "
            "(`prelora preflight --hostfile ...`)", missing))

    first = by_rank[0]
    for rank in range(world_size):
        info = by_rank[rank]
        for key in sorted({*first.fingerprint, *info.fingerprint}):
            value = info.fingerprint.get(key)
            expected = first.fingerprint.get(key)
            if value != expected:
                return _verdict(mistake=(
                    key, value,
                    f"on host {info.host} (rank {rank}); host {first.host} has {expected!r}",
                    "use the same installation and recipe on all hosts; if these are two jobs, "
                    "give each its own port"))
    return _verdict(hosts=[by_rank[rank].host for rank in range(world_size)])


def check_master(ranks: Ranks) -> None:
    """Raise LaunchError when rank 0 cannot listen: the address is another host's, or the port is
    in use.
    """
    assert ranks.master_addr is not None
    here = socket.gethostname()
    if not is_mine(ranks.master_addr):
        raise LaunchError(f"MASTER_ADDR = {ranks.master_addr!r}: does not belong to host {here}, "
                          "where rank 0 runs\n"
                          "  remedy: set it to an address of that host (deepspeed: --master_addr)")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", ranks.master_port))
        except OSError as exc:
            raise LaunchError(f"MASTER_PORT = {ranks.master_port}: is in use on host {here} "
                              f"({exc.strerror})\n"
                              "  remedy: choose another port (deepspeed: --master_port)") from exc


def _spans(numbers: Sequence[int]) -> str:
    """Format sorted numbers as ranges: ``[0, 1, 2, 5]`` -> ``0-2, 5``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
