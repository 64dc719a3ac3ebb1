"""What does the start of a run cost as the number of ranks grows?

    python benchmarks/start.py    # needs strace (Debian: apt-get install strace), but not root

The ranks of launch/pretrain.py run under strace until they ask for their first batch. The file-system operations of a
host are those of all its ranks, by what they are for:

- ours: settings (the recipe and DeepSpeed's JSON), data (manifests, indexes and the sizes of shards), code (the Python
  files of this package, the versions of packages, and the commit), and output (the folder of the run).
- libraries: what torch, DeepSpeed, transformers and the system read when they are called.
- import: what Python reads to start and to import modules. Each process does that for itself; from the second process
  of a host on, the page cache has the files.
- kernel: /proc, /sys and /dev, which are in memory.

One machine stands for a host of 1, 4 and 16 ranks, and once for two hosts. What 1,024 ranks need is calculated from
these measurements. Seconds are of other starts, without strace.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from harness import ROOT, print_table, record
from ranks import free_port

from prelora_ds.data.shards.writer import write_digits

RECIPE = "launch/recipes/vit_tiny_debug.yaml"
DEEPSPEED_CONFIG = "ds_configs/zero2.json"
MARKS = "/marks-of-start/"
RANKS = (1, 4, 16)
HOSTS = 64  # of 16 ranks each, in the job of 1,024 ranks
SAMPLES_PER_SHARD = 2  # so that the digits have about as many shards as ImageNet usually has
OURS = ("settings", "data", "code", "output")
# Calls with a path, and those on an open file, whose path `strace -y` shows.
CALLS = "trace=%file,getdents64,read,pread64,write,fsync,ftruncate"
NO_OPERATIONS = ("execve", "getcwd", "chdir")
KERNEL = ("/proc", "/sys", "/dev")
LINE = re.compile(r"^(?P<pid>\d+) +(?P<call>\w+)\((?P<arguments>.*)$")
PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')
DESCRIPTOR = re.compile(r"^\d+<(.*?)>")

Row = dict[str, Any]


def launch(hosts: Sequence[int], shards: Path, folder: Path, *, traced: bool) -> None:
    """Start the ranks as a launcher would, and wait until they have ended.

    hosts: the number of ranks of each host.

    Each rank leaves rank-R.json in ``folder``, and trace-R if it is traced. Raises RuntimeError if one fails.
    """
    folder.mkdir()
    arguments = ["--recipe", RECIPE, "--deepspeed_config", DEEPSPEED_CONFIG, f"run.output_dir={folder}/out",
                 f"data.train={shards}/train", f"data.val={shards}/val", "train.micro_batch_size=4"]
    job = {"WORLD_SIZE": str(sum(hosts)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
           "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    processes = []
    for host, size in enumerate(hosts):
        for local_rank in range(size):
            rank = len(processes)
            command = [sys.executable, "benchmarks/start_ranks.py", str(folder), *arguments]
            if traced:
                command = ["strace", "-f", "-y", "--seccomp-bpf", "-s", "300", "-e", CALLS, "-e", "signal=none",
                           "-o", str(folder / f"trace-{rank}"), *command]
            environ = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(size),
                       "HOST_NAME": f"host{host}"}
            with (folder / "log").open("a") as log:
                processes.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | job | environ,
                                                  stdin=subprocess.DEVNULL, stdout=log, stderr=log))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}: {(folder / 'log').read_text()[-3000:]}")


def operations(trace: Path, shards: Path, out: Path) -> Counter[str]:
    """Count the file-system operations of a rank until its first batch, by what they are for."""
    counts: Counter[str] = Counter()
    purposes: dict[str, list[str]] = {}  # of each thread, innermost last
    first = ""  # the main thread
    marked = False
    for line in trace.read_text(errors="replace").splitlines():
        match = LINE.match(line)
        if match is None or match["call"] in NO_OPERATIONS:
            continue  # such as "<... resumed>", the end of a call that was counted when it began
        path = path_of(match["arguments"])
        if path is None:
            continue
        if not first:
            first = match["pid"]
            purposes[first] = ["import"]  # Python starts
        # A new process or thread belongs to what the main thread does when it begins.
        now = purposes.setdefault(match["pid"], list(purposes[first]))
        if path.startswith(MARKS):
            name = path.removeprefix(MARKS)
            if not marked:
                now.clear()  # Python has started
                marked = True
            if name == "first-batch":
                return counts
            if name == "leave":
                now.pop()
            else:
                now.append(name.removeprefix("enter-"))
        elif path.startswith(KERNEL):
            counts["kernel"] += 1
        else:
            counts[now[-1] if now else purpose_of(path, shards, out)] += 1
    raise ValueError(f"{trace} has no first batch")


def path_of(arguments: str) -> str | None:
    """Return the path of a call from its arguments as strace prints them; None if it has none, such as a socket."""
    text = PATH.search(arguments)
    opened = DESCRIPTOR.match(arguments)
    if opened is not None:  # a read, or a call for the open file itself
        return opened[1] if opened[1].startswith("/") else None
    if text is None:
        return None
    return text[1] if text[1].startswith("/") else str(ROOT / text[1])


def purpose_of(path: str, shards: Path, out: Path) -> str:
    """Return what an operation is for that happens outside of an import."""
    if path in (str(ROOT / RECIPE), str(ROOT / DEEPSPEED_CONFIG)):
        return "settings"
    if path.startswith(str(shards)):
        return "data"
    if path.startswith(str(out)):
        return "output"
    script = path.startswith((str(ROOT / "benchmarks"), str(ROOT / "launch"), str(ROOT / ".venv")))
    return "code" if path.startswith(str(ROOT)) and not script else "libraries"


def ours(counts: Mapping[str, int]) -> int:
    return sum(counts.get(name, 0) for name in OURS)


def traced_start(hosts: Sequence[int], shards: Path, folder: Path) -> list[Counter[str]]:
    """Return the operations of each rank of a start."""
    launch(hosts, shards, folder, traced=True)
    counts = [operations(folder / f"trace-{rank}", shards, folder / "out") for rank in range(sum(hosts))]
    for trace in folder.glob("trace-*"):
        trace.unlink()  # 20 MB each
    return counts


def row(ranks: int, each: Sequence[Counter[str]], folder: Path) -> Row:
    """Return the costs of a start on one host, from its operations and from what its ranks left in ``folder``."""
    of_ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    total = sum(each, Counter[str]())
    return {
        "hosts": 1, "ranks per host": ranks, "ours": ours(total),
        "first rank": ours(each[0]), "each other rank": mean(map(ours, each[1:])) if ranks > 1 else None,
        **{name: total[name] for name in (*OURS, "libraries", "import", "kernel")},
        "objects gathered": of_ranks[0].get("objects_gathered", 0),
        "bytes gathered": sum(rank.get("gathered_bytes", 0) for rank in of_ranks),
        "objects broadcast": of_ranks[0].get("objects_broadcast", 0),
        "bytes published": of_ranks[0]["published_bytes"],
        "seconds": round(max(rank["seconds"] for rank in of_ranks), 1),
    }


def at_scale(largest: Row, other_host: Sequence[Counter[str]]) -> Row:
    """Return what HOSTS hosts of as many ranks as the ``largest`` row cost, calculated from what was measured.

    other_host: the operations of the ranks of a host without rank 0.
    """
    ranks = largest["ranks per host"]
    leader, follower = other_host[0], other_host[1]
    return {
        "hosts": HOSTS, "ranks per host": ranks, "what": "calculated",
        "ours": largest["ours"] + (HOSTS - 1) * (ours(leader) + (ranks - 1) * ours(follower)),
        "first rank": ours(leader), "each other rank": ours(follower),
        "objects gathered": largest["objects gathered"],
        "bytes gathered": largest["bytes gathered"] * HOSTS,
        "objects broadcast": largest["objects broadcast"],
        "bytes published": largest["bytes published"],
    }


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    one, *_, largest, large_job = rows
    without_data = [each["ours"] - each["data"] for each in (one, largest)]
    return {
        "fs_ops_per_host": largest["ours"],
        "fs_ops_growth": largest["ours"] / one["ours"],
        "fs_ops_growth_without_data": without_data[1] / without_data[0],
        "fs_ops_growth_with_imports": _everything(largest) / _everything(one),
        "fs_ops_of_1024_ranks": large_job["ours"],
        "fs_ops_of_1024_ranks_if_each_read_all": large_job["first rank"] * HOSTS * largest["ranks per host"],
        "objects_gathered": largest["objects gathered"],
        "bytes_gathered_by_a_rank_of_1024": large_job["bytes gathered"],
        "bytes_from_rank_0_of_1024": large_job["bytes published"] * HOSTS * (largest["ranks per host"] - 1),
    }


def _everything(row: Row) -> int:
    return row["ours"] + row["libraries"] + row["import"]


def load() -> str:
    return f"load averages when it began: {', '.join(f'{value:.1f}' for value in os.getloadavg())}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if shutil.which("strace") is None:
        sys.exit("strace is not installed (Debian: apt-get install strace)")
    rows = []
    busy = load()
    with tempfile.TemporaryDirectory(prefix="start.") as name:
        shards = Path(name) / "shards"
        manifests = write_digits(shards, SAMPLES_PER_SHARD)
        launch([1], shards, Path(name) / "warm-up", traced=False)  # Python compiles modules, git refreshes its index
        for ranks in RANKS:
            folder = Path(name) / f"{ranks}-ranks"
            each = traced_start([ranks], shards, folder)
            timed = Path(name) / f"{ranks}-ranks-timed"
            launch([ranks], shards, timed, traced=False)
            rows.append(row(ranks, each, timed))
            print(rows[-1], flush=True)
        other_host = traced_start([2, 2], shards, Path(name) / "two-hosts")[2:]
    rows.append(at_scale(rows[-1], other_host))
    columns = ("hosts", "ranks per host", "ours", "first rank", "each other rank", *OURS, "libraries", "import",
               "seconds")
    print_table([{name: each.get(name) for name in columns} for each in rows],
                "the start of a run: file-system operations, of one host where they were measured")
    found = figures(rows)
    print(json.dumps(found, indent=2))
    count = sum(len(manifest.shards) for manifest in manifests.values())
    notes = (f"{count} shards in train and val. Hosts are one machine, so its seconds are those of ranks that share "
             f"its cores, and grow with their number; {busy}. The row of {HOSTS} hosts is calculated: the operations "
             "of the measured host with rank 0, and for each other host those of a measured host without it.")
    record("start", found, rows, notes)


if __name__ == "__main__":
    main()
