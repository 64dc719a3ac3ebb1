"""Why an attempt of `prelora supervise` failed, and on which host, by its ranks' records."""

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

ABORTED = "Fatal Python error: Aborted"  # the first line that faulthandler writes


@dataclass(frozen=True)
class Failure:
    """How an attempt failed.

    code: the exit code to pass on.
    why: the reason in words.
    hosts: the hosts that caused the failure; empty if unknown.
    kind: equal for two failures with the same cause, whatever their hosts.
    """

    code: int
    why: str
    hosts: Sequence[str]
    kind: str


def diagnose(attempt_dir: Path, returncode: int | None, hosts: Sequence[Host],
             unreachable: Sequence[str], without_record: set[str]) -> Failure:
    """Find the cause of a failed attempt.

    The causes, the most certain first:

    1. a usage error that rank 0's host reports too
    2. a host that does not respond
    3. the first exit record that is not an echo of another rank's exit
    4. a host on which no rank started
    5. a host whose rank left no exit record
    6. what else the records or the launcher report

    A usage error that rank 0's host does not report too is specific to one host (another disk,
    another interface), and gets the code 75.

    attempt_dir: the folder of the attempt. unreachable: hosts that do not respond.
    without_record: hosts of ranks that left no exit record before they were ended, and were not aborted.
    """
    records = records_of(attempt_dir, "exit", hosts)
    causes = [record for record in records if not is_echo(record)]
    starts = records_of(attempt_dir, "rank", hosts)
    hosts_by_rank = {start["rank"]: start["host"] for start in starts}
    for record in causes:
        if record["code"] == USAGE_EXIT_CODE and record["host"] not in unreachable:
            on_host_of_rank_0 = hosts_by_rank.get(0, record["host"]) == record["host"]
            if not record["blames"] and on_host_of_rank_0:
                return _failure_from_record(record, hosts_by_rank, hosts)
            record["code"] = TRY_AGAIN_EXIT_CODE
    if unreachable:
        why = f"host {', '.join(unreachable)} does not respond"
        return Failure(TRY_AGAIN_EXIT_CODE, why, unreachable, "unreachable")
    if causes:
        # A rank that only timed out waiting for others is not the cause. If all did, rank 0
        # knows best who was missing.
        failed = [record for record in causes if not record["blames"]]
        failed = failed or sorted(causes, key=lambda record: int(record["rank"]))
        return _failure_from_record(failed[0], hosts_by_rank, hosts)

    absent = [host.name for host in hosts if host.name not in hosts_by_rank.values()]
    if absent and len(hosts_by_rank) < sum(host.slots for host in hosts):
        why = f"no rank started on host {', '.join(absent)}; launcher output: "
        return Failure(TRY_AGAIN_EXIT_CODE, why + _tail(attempt_dir / "launcher.log"), absent,
                       "no rank started")
    if len(without_record) == 1:
        code = int(records[0]["code"]) if records else TRY_AGAIN_EXIT_CODE
        why = (f"the rank on host {', '.join(without_record)} exited without a record "
               "(killed, frozen or disconnected)")
        return Failure(code, why, [*without_record], "no record")
    if records:
        why = str(records[0]["why"])
        return Failure(int(records[0]["code"]), why, [], why.splitlines()[0])
    why = f"the launcher exited with {returncode}, and no rank left a reason: "
    return Failure(TRY_AGAIN_EXIT_CODE, why + _tail(attempt_dir / "launcher.log"), [], why)


def _failure_from_record(record: dict[str, Any], hosts_by_rank: Mapping[int, str],
                         hosts: Sequence[Host]) -> Failure:
    """Return the failure in a rank's exit record.

    It is on the rank's own host, or on the hosts of the ranks that the record blames.
    """
    blamed = [hosts_by_rank.get(rank) or host_of_rank(rank, hosts) for rank in record["blames"]]
    blamed = blamed or [record["host"]]
    who = "a rank" if record["rank"] is None else f"rank {record['rank']}"
    first_line = str(record["why"]).splitlines()[0]
    kind = re.sub(r"\d+", "#", first_line)  # ports, ranks and seconds differ between attempts
    return Failure(int(record["code"]), f"{who}: {record['why']}",
                   [host for host in dict.fromkeys(blamed) if host], kind)


def is_echo(record: dict[str, Any]) -> bool:
    """Whether this failure is a consequence of another rank's.

    The failure of a rank that was itself suspended is not an echo.
    """
    if record.get("slept_s"):
        return False
    if record.get("code") in (HANG_EXIT_CODE, ORPHAN_EXIT_CODE, FENCED_EXIT_CODE):
        return True
    why = str(record.get("why"))
    # These come from a pipe or socket on the rank's own host.
    is_local = why.startswith(("BrokenPipeError", "ConnectionResetError"))
    return not is_local and any(sign in why for sign in LOST_PEER)


def records_of(attempt_dir: Path, kind: str, hosts: Sequence[Host]) -> list[dict[str, Any]]:
    """Return the start (``rank``) or exit (``exit``) records of ranks, oldest first.

    Hosts have their names from the hostfile.
    """
    paths = sorted(attempt_dir.glob(f"{kind}-*.json"),
                   key=lambda path: (path.stat().st_mtime_ns, path.name))
    default: dict[str, Any] = {"rank": None, "code": TRY_AGAIN_EXIT_CODE,
                               "why": "a record cannot be read", "blames": []}
    records = []
    for path in paths:
        content = read_json(path)
        record = default | (content if _is_valid(content) else {})
        record["host"] = hostfile_name(str(record.get("host")), record["rank"], hosts)
        records.append(record)
    return records


def aborted_ranks(attempt_dir: Path) -> set[int]:
    """Return the ranks that SIGABRT ended.

    NCCL's watchdog aborts a rank whose collective failed, because another rank is gone: without an exit record this is
    an echo, like an error of gloo.
    """
    return {int(path.stem.partition("-")[2]) for path in attempt_dir.glob("fatal-*.txt")
            if path.read_text(errors="replace").startswith(ABORTED)}


def _is_valid(record: Mapping[str, Any]) -> bool:
    """Whether a record has the types that a rank writes."""
    rank = record.get("rank")
    blames = record.get("blames", [])
    return (isinstance(rank, int | None) and isinstance(record.get("code", 0), int)
            and isinstance(blames, list) and all(isinstance(blamed, int) for blamed in blames))


def hostfile_name(name: str, rank: int | None, hosts: Sequence[Host]) -> str:
    """Return the name in the hostfile of the host that calls itself ``name``.

    The two may differ by a domain. If the hostfile uses addresses, the host is found by ``rank``.
    """
    same = [host.name for host in hosts
            if host.name == name or host.name.split(".")[0] == name.split(".")[0]]
    if name in same:
        return name
    return same[0] if len(same) == 1 else host_of_rank(rank, hosts) or name


def host_of_rank(rank: int | None, hosts: Sequence[Host]) -> str | None:
    """Return the host of ``rank`` if the launcher fills one host after the other.

    All launchers that we know do.
    """
    by_rank = [host.name for host in hosts for _ in range(host.slots)]
    return by_rank[rank] if rank is not None and rank < len(by_rank) else None


def succeeded(attempt_dir: Path) -> bool:
    """Whether rank 0 marked the result as complete on disk.

    A stop that was requested by orphaned ranks is not the end of the run.
    """
    orphans = (read_json(path).get("code") == ORPHAN_EXIT_CODE
               for path in attempt_dir.glob("exit-*.json"))
    stopped = (attempt_dir / "STOPPED").exists()
    return (attempt_dir / "DONE").exists() or (stopped and not any(orphans))


def _tail(path: Path, lines: int = 6) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
