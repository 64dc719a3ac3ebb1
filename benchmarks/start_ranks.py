"""A rank of benchmarks/start.py: launch/pretrain.py until its first batch, with marks for strace.

    python benchmarks/start_ranks.py OUT ARGUMENTS OF launch/pretrain.py

A mark is a system call for a path below MARKS, which does not exist: ``enter-PURPOSE`` and ``leave`` surround what
has a purpose that its paths do not show, and ``first-batch`` comes last. The rank writes the seconds and the messages
of its start to OUT/rank-R.json. HOST_NAME in its environment lets one machine stand for several hosts.
"""

import importlib._bootstrap as bootstrap  # CPython 3.11: `import` and importlib both find modules by `_find_and_load`
import json
import linecache
import os
import pickle
import runpy
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

MARKS = "/marks-of-start/"
STARTED = time.monotonic()

counts = Counter()
inside = threading.local()


def mark(name):
    os.access(MARKS + name, os.F_OK)


def with_marks(owner, name, purpose):
    """Surround each outermost call of ``owner.name`` with the marks of ``purpose``."""
    original = getattr(owner, name)

    def call(*arguments, **options):
        if getattr(inside, purpose, False):
            return original(*arguments, **options)
        setattr(inside, purpose, True)
        mark(f"enter-{purpose}")
        try:
            return original(*arguments, **options)
        finally:
            mark("leave")
            setattr(inside, purpose, False)

    setattr(owner, name, call)


def counted(owner, name, count):
    """Call ``count`` with the arguments of every call of ``owner.name``."""
    original = getattr(owner, name)

    def call(*arguments, **options):
        count(*arguments, **options)
        return original(*arguments, **options)

    setattr(owner, name, call)


def gathered(objects, own, *_, **__):
    counts["objects_gathered"] += 1
    counts["gathered_bytes"] += len(pickle.dumps(own))


def broadcast(objects, *_, **__):
    counts["objects_broadcast"] += 1
    counts["broadcast_bytes"] += len(pickle.dumps(objects))


def published(store, key, value):
    if "/host/" in key:  # what one rank of a host has read
        counts["published_bytes"] += len(value)


def end_at_the_first_batch(loader):
    mark("first-batch")
    result = {"seconds": time.monotonic() - STARTED, **counts}
    Path(out, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.barrier()  # a rank that exits would disturb those that have not come so far
    os._exit(0)


out = sys.argv.pop(1)
if name := os.environ.get("HOST_NAME"):
    socket.gethostname = lambda: name
with_marks(bootstrap, "_find_and_load", "import")
# torch keeps a traceback when it seeds a device that it has not initialised, and so reads the source of all callers.
with_marks(linecache, "updatecache", "libraries")
with_marks(linecache, "checkcache", "libraries")
import torch.distributed  # noqa: E402

import prelora_ds.start  # noqa: E402

with_marks(prelora_ds.start, "installed_code", "code")
counted(torch.distributed, "all_gather_object", gathered)
counted(torch.distributed, "broadcast_object_list", broadcast)
counted(torch.distributed.TCPStore, "set", published)

from prelora_ds.data.loader import Loader  # noqa: E402

Loader.next = end_at_the_first_batch
sys.argv[0] = str(Path(__file__).resolve().parents[1] / "launch" / "pretrain.py")
runpy.run_path(sys.argv[0], run_name="__main__")
