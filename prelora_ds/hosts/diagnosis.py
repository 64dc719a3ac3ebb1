"""Why an attempt of `prelora supervise` failed, and on which host: read from what its ranks left on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelora_ds.errors import (
    FENCED_EXIT_CODE,
    HANG_EXIT_CODE,
    ORPHAN_EXIT_CODE,
    TRY_AGAIN_EXIT_CODE,
    USAGE_EXIT_CODE,
)
from prelora_ds.hosts.exits import LOST_PEER
from prelora_ds.hosts.heartbeat import read_json
from prelora_ds.hosts.hostfile import Host


@dataclass(frozen=True)
class Failure:
    """How an attempt ended: the exit code to pass on, why, and the hosts that began it (none: unknown).

    kind: the same for two failures that are one, on whatever hosts.
    """

    code: int
    why: str
    hosts: Sequence[str]
    kind: str


def diagnose(own: Path, returncode: int | None, hosts: Sequence[Host], silent: Sequence[str],
             unheard: set[str]) -> Failure:
    """The user's mistake, else a silent host, else the first record that is no echo of another rank's end.

    A mistake that rank 0's host does not report as its own is that of one host (another disk,
    another interface).
    ``own``: the attempt's folder. silent: hosts that do not answer. unheard: those of ranks that left no record until
    they were ended.
    """
    records = records_of(own, "exit", hosts)
    began = [record for record in records if not is_echo(record)]
    places = {came["rank"]: came["host"] for came in records_of(own, "rank", hosts)}
    for record in began:
        if record["code"] == USAGE_EXIT_CODE and record["host"] not in silent:
            if not record["blames"] and places.get(0, record["host"]) == record["host"]:
                return _told(record, places, hosts)
            record["code"] = TRY_AGAIN_EXIT_CODE
    if silent:
        return Failure(TRY_AGAIN_EXIT_CODE, f"host {', '.join(silent)} does not answer", silent, "silent")
    if began:
        # Who waited in vain for others is not who failed; of those rank 0 knows best who did not come.
        failed = [record for record in began if not record["blames"]] or sorted(began, key=lambda r: int(r["rank"]))
        return _told(failed[0], places, hosts)
    absent = [host.name for host in hosts if host.name not in places.values()]
    if absent and len(places) < sum(host.slots for host in hosts):
        return Failure(TRY_AGAIN_EXIT_CODE, f"no rank came on host {', '.join(absent)}; the launcher says: "
                       + _tail(own / "launcher.log"), absent, "no rank came")
    if len(unheard) == 1:
        return Failure(int(records[0]["code"]) if records else TRY_AGAIN_EXIT_CODE,
                       f"the rank on host {', '.join(unheard)} left no record of its end: killed, frozen or cut off",
                       [*unheard], "no record")
    if records:
        why = str(records[0]["why"])
        return Failure(int(records[0]["code"]), why, [], why.splitlines()[0])
    why = f"the launcher ended with {returncode}, and no rank says why: "
    return Failure(TRY_AGAIN_EXIT_CODE, why + _tail(own / "launcher.log"), [], why)


def _told(record: dict[str, Any], places: Mapping[int, str], hosts: Sequence[Host]) -> Failure:
    """The failure that a rank's record tells, on its host, or on those of the ranks it blames. places: rank -> host."""
    blamed = [places.get(rank) or place_of(rank, hosts) for rank in record["blames"]] or [record["host"]]
    who = "a rank" if record["rank"] is None else f"rank {record['rank']}"
    return Failure(int(record["code"]), f"{who}: {record['why']}", [host for host in dict.fromkeys(blamed) if host],
                   re.sub(r"\d+", "#", str(record["why"]).splitlines()[0]))  # ports, ranks and seconds differ


def is_echo(record: dict[str, Any]) -> bool:
    """Whether a rank only felt that another one ended, hung or was given up. One that was itself stopped is no echo."""
    if record.get("slept_s"):
        return False
    why = str(record.get("why"))
    if record.get("code") in (HANG_EXIT_CODE, ORPHAN_EXIT_CODE, FENCED_EXIT_CODE):
        return True
    its_own = why.startswith(("BrokenPipeError", "ConnectionResetError"))  # of a pipe or socket on that host
    return not its_own and any(sign in why for sign in LOST_PEER)


def records_of(own: Path, kind: str, hosts: Sequence[Host]) -> list[dict[str, Any]]:
    """What ranks left of their begin (``rank``) or their end (``exit``), oldest first; hosts as in the hostfile."""
    paths = sorted(own.glob(f"{kind}-*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    unread: dict[str, Any] = {"rank": None, "code": TRY_AGAIN_EXIT_CODE, "why": "a record cannot be read",
                              "blames": []}
    records = [unread | (found if _is_sound(found := read_json(path)) else {}) for path in paths]
    return [record | {"host": known_as(str(record.get("host")), record["rank"], hosts)} for record in records]


def _is_sound(record: Mapping[str, Any]) -> bool:
    """Whether what is in a record is what a rank writes."""
    rank, blames = record.get("rank"), record.get("blames", [])
    return (isinstance(rank, int | None) and isinstance(record.get("code", 0), int)
            and isinstance(blames, list) and all(isinstance(blamed, int) for blamed in blames))


def known_as(name: str, rank: int | None, hosts: Sequence[Host]) -> str:
    """The name in the hostfile of the host that calls itself ``name``: one of them may have a domain behind it, or the
    hostfile has addresses; then the place of its ``rank`` tells."""
    same = [host.name for host in hosts if host.name == name or host.name.split(".")[0] == name.split(".")[0]]
    if name in same:
        return name
    return same[0] if len(same) == 1 else place_of(rank, hosts) or name


def place_of(rank: int | None, hosts: Sequence[Host]) -> str | None:
    """The host of ``rank`` where a launcher fills one host after the other, as all that we know do."""
    places = [host.name for host in hosts for _ in range(host.slots)]
    return places[rank] if rank is not None and rank < len(places) else None


def succeeded(own: Path) -> bool:
    """Whether rank 0 left the mark that all is on disk.

    A stop that orphans asked for is not the end of the run.
    """
    orphans = (read_json(path).get("code") == ORPHAN_EXIT_CODE for path in own.glob("exit-*.json"))
    return (own / "DONE").exists() or ((own / "STOPPED").exists() and not any(orphans))


def _tail(path: Path, lines: int = 6) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
