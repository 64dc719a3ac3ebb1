"""How many hosts does a run start on, and does every fault end in bounded time, with the host named? Writes hosts.json.

Hosts are network namespaces on one machine (tests/hosts), so all of them share its cores: seconds say how long the
launchers take here, nothing about a network.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import ROOT, print_table, record

sys.path.insert(0, str(ROOT / "tests"))
from hosts import cluster, refusals, scenarios, slurm
from hosts.scenarios import Site

from prelora_ds.data.writer import DIGIT_CLASSES, digits, write_shards

Rows = list[dict[str, Any]]


def attempt(rows: Rows, what: str, act: Callable[[], dict[str, Any]]) -> None:
    """Run ``act``; a failure is a row as well."""
    try:
        row = act()
    except Exception as exc:
        traceback.print_exc()
        row = {"what": what, "result": f"FAILED: {type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"}
    rows.append(row)
    print(row, flush=True)


def launches(rows: Rows, site: Site) -> None:
    """2 and 4 hosts by every launcher, against local ranks."""
    for size in (2, 4):
        expected = scenarios.local(site, size)
        for launcher in ("pdsh", "openmpi", "mpirun", "mpich", "srun"):
            attempt(rows, f"{launcher}, {size} hosts", partial(scenarios.launch, site, launcher, expected, size))
    attempt(rows, "a Slurm chain", lambda: scenarios.slurm_chain(site))


def faults(rows: Rows, shards: Path, folder: Path) -> None:
    """Each fault on hosts of its own: what it breaks stays broken."""
    expected: Sequence[float] = ()
    for number, fault in enumerate(scenarios.FAULTS):
        with cluster.Cluster(3, folder / f"fault{number}") as hosts:
            site = Site(hosts, shards)
            expected = expected or scenarios.local(site, 2, *scenarios.STEPS)
            attempt(rows, fault.name, partial(scenarios.strike, site, fault, expected))
    with cluster.Cluster(2, folder / "fewer") as hosts:
        attempt(rows, "no spare: fewer hosts", lambda: scenarios.strike(
            Site(hosts, shards), scenarios.FAULTS[-1], expected, 2, "--min-nodes", "1"))
    with cluster.Cluster(3, folder / "refused") as hosts:
        site = Site(hosts, shards)
        attempt(rows, "the supervisor is killed", lambda: scenarios.supervisor_killed(site))
        for name, act in refusals.REFUSALS.items():
            attempt(rows, name, partial(act, site))


def sixteen(rows: Rows, shards: Path, folder: Path) -> None:
    """16 hosts start, pass both switches and stop clean; preflight looks at them."""
    begun = time.monotonic()
    with cluster.Cluster(16, folder / "sixteen") as hosts:
        site = Site(hosts, shards)
        print(f"16 hosts are up after {time.monotonic() - begun:.1f} s", flush=True)
        attempt(rows, "preflight, 16 hosts", lambda: scenarios.preflight(site))
        for launcher in ("pdsh", "mpirun"):
            attempt(rows, f"{launcher}, 16 hosts", partial(
                scenarios.launch, site, launcher, (), 16, "train.micro_batch_size=4", timeout=500))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("launches", "faults", "sixteen"), help="a part; then nothing is recorded")
    only = parser.parse_args().only
    if why := cluster.why_not() or slurm.why_not():
        sys.exit(f"no test hosts here: {why}")
    rows: Rows = []
    with tempfile.TemporaryDirectory(prefix="hosts.", ignore_cleanup_errors=True) as name:
        folder, shards = Path(name), Path(name) / "digits"
        for split in ("train", "val"):
            write_shards(digits(split), shards / split, samples_per_shard=512, class_names=DIGIT_CLASSES)
        if only in (None, "launches"):
            with cluster.Cluster(4, folder / "launches") as hosts:
                launches(rows, Site(hosts, shards, slurm.Slurm(hosts).start()))
        if only in (None, "sixteen"):
            sixteen(rows, shards, folder)
        if only in (None, "faults"):
            faults(rows, shards, folder)
    print_table(rows, "many hosts, on one machine")
    tried = [row for row in rows if "named" in row or ("hosts" not in row and "FAILED" in row["result"])]
    large = [row for row in rows if row.get("hosts") == 16 and "start_s" in row]
    failed = [row for row in rows if "FAILED" in row["result"]]
    if only is None:
        record("hosts", {"hosts": max((row["hosts"] for row in large), default=0),
                         "start_s": min((row["start_s"] for row in large), default=float("nan")),
                         "total_s": min((row["total_s"] for row in large), default=float("nan")),
                         "faults_tried": len(tried), "faults_named": sum(bool(row.get("named")) for row in tried),
                         "failed": len(failed)}, rows,
               "hosts are namespaces on one machine with gloo over veth; no GPU, no NCCL, no site was seen. start_s: "
               "from the launcher's start to the first step's line; total_s: to its end.")
    if failed:
        sys.exit(f"{len(failed)} of {len(rows)} failed")


if __name__ == "__main__":
    main()
