"""On how many hosts can a run start, and does every fault end in bounded time with its host named?

    python benchmarks/many_hosts.py [--only WORDS]    # make test-hosts

Hosts are network namespaces on one machine (tests/hosts), so all of them share its cores. The
seconds are those of the launchers here, and say nothing about a network. Writes hosts.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, git_state, print_table, record

sys.path.insert(0, str(ROOT / "tests"))
from hosts import cluster, refusals, scenarios, slurm
from hosts.scenarios import Site

from prelora_ds.data.shards.writer import write_digits

Row = dict[str, Any]
SLURM_FAULTS = ("a node of a Slurm job goes down", "the first node of a Slurm job goes down")
LAUNCHERS = ("pdsh", "openmpi", "mpirun", "mpich", "srun", "torchrun")


def scenarios_of(shards: Path, folder: Path) -> dict[str, Callable[[], Row]]:
    """Return every scenario by name. Each runs on new hosts, because a broken host stays broken."""

    def on(
        size: int, act: Callable[[Site], Row], with_slurm: bool = False, apart: bool = False
    ) -> Callable[[], Row]:
        def run() -> Row:
            with cluster.Cluster(size, folder / f"hosts{time.monotonic_ns()}") as hosts:
                return act(
                    Site(hosts, shards, slurm.Slurm(hosts, apart).start() if with_slurm else None)
                )

        return run

    @cache
    def expected(ranks: int, *more: str) -> tuple[float, ...]:
        return tuple(
            on(1, lambda site: {"losses": scenarios.local(site, ranks, *more)})()["losses"]
        )

    def launch(launcher: str, size: int) -> Callable[[Site], Row]:
        return lambda site: scenarios.launch(site, launcher, expected(size), size)

    def strike(fault: scenarios.Fault, *more: str) -> Callable[[Site], Row]:
        return lambda site: scenarios.strike(site, fault, expected(2, *scenarios.STEPS), 2, *more)

    large = "train.micro_batch_size=4"  # 16 ranks of 64 images
    result = {
        f"{launcher}, {size} hosts": on(
            size, launch(launcher, size), launcher in ("srun", "torchrun")
        )
        for size in (2, 4)
        for launcher in LAUNCHERS
    }
    result |= {"preflight, 16 hosts": on(16, scenarios.preflight)}
    result |= {
        f"{launcher}, 16 hosts": on(
            16,
            lambda site, launcher=launcher: scenarios.launch(
                site, launcher, (), 16, large, timeout=500
            ),
        )
        for launcher in ("pdsh", "mpirun")
    }
    result |= {"a Slurm chain": on(3, scenarios.slurm_chain, True)}
    result |= {scenarios.SWEEP: on(3, scenarios.slurm_sweep, True)}
    result |= {
        SLURM_FAULTS[0]: on(3, scenarios.slurm_node_dies, True),
        SLURM_FAULTS[1]: on(5, scenarios.slurm_first_node_dies, True, apart=True),
    }
    result |= {fault.name: on(3, strike(fault)) for fault in scenarios.FAULTS}
    result |= {"no spare: fewer hosts": on(2, strike(scenarios.NO_SPARE, "--min-nodes", "1"))}
    result |= {name: on(3, act) for name, act in scenarios.OTHER_FAULTS.items()}
    return result | {name: on(2, act) for name, act in refusals.REFUSALS.items()}


def attempt(name: str, act: Callable[[], Row]) -> Row:
    """Return the row of ``act``, also if it fails."""
    try:
        row = act()
    except Exception as exc:
        traceback.print_exc()
        row = {
            "result": f"FAILED: {type(exc).__name__}: {(str(exc).splitlines() or [''])[0]}"[:200]
        }
    return {
        "what": name,
        **{key: value for key, value in row.items() if key != "what"},
        "commit": git_state()["commit"][:9],
    }


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Summarise the rows. The largest launch is represented by the fastest one on 16 hosts."""
    large = [row for row in rows if "start_s" in row and row["hosts"] == 16]
    names = {fault.name for fault in (*scenarios.FAULTS, scenarios.NO_SPARE)} | {
        *scenarios.OTHER_FAULTS,
        *refusals.REFUSALS,
        *SLURM_FAULTS,
    }
    faults = [row for row in rows if row["what"] in names]
    return {
        "hosts": max((row["hosts"] for row in rows if "start_s" in row), default=0),
        "start_s": min((row["start_s"] for row in large), default=0.0),
        "total_s": min((row["total_s"] for row in large), default=0.0),
        "faults_tried": len(faults),
        "faults_named": sum(bool(row.get("named")) for row in faults),
        "failed": sum("FAILED" in row["result"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        metavar="WORDS",
        help="run only scenarios with these words in their name; the rows of the others are kept",
    )
    only = parser.parse_args().only
    if why := cluster.why_not() or slurm.why_not():
        sys.exit(f"no test hosts here: {why}")
    path = RESULTS / "hosts.json"
    kept = json.loads(path.read_text())["rows"] if only is not None and path.is_file() else []
    rows: dict[str, Row] = {row["what"]: row for row in kept}
    with tempfile.TemporaryDirectory(prefix="hosts.", ignore_cleanup_errors=True) as name:
        folder, shards = Path(name), Path(name) / "digits"
        write_digits(shards)
        for what, act in scenarios_of(shards, folder).items():
            if only is None or only in what:
                rows[what] = {
                    key: value.replace(str(folder), "DIR") if isinstance(value, str) else value
                    for key, value in attempt(what, act).items()
                }
                print(rows[what], flush=True)
                record("hosts", figures([*rows.values()]), [*rows.values()], NOTES)
    print_table([*rows.values()], "many hosts, on one machine")
    if failed := figures([*rows.values()])["failed"]:
        sys.exit(f"{failed} of {len(rows)} failed")


NOTES = (
    "Hosts are namespaces on one machine with 2 cores, gloo over veth, without GPU, NCCL or a real site. "
    "start_s: from the launcher's start to the line of the first step; total_s: to its end; ended_s: from a "
    "fault to the end of the attempt, or of the last rank. Other work may have shared the cores."
)

if __name__ == "__main__":
    main()
