"""Fill a cache of shards. A spawned process imports these functions by name."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

from prelora_ds.data.cache import CacheFiller, ShardCache
from prelora_ds.data.manifest import Manifest


def stage(manifest: Manifest, cache: ShardCache) -> None:
    CacheFiller(manifest, cache).join()


def stage_and_report(
    manifest: Manifest, folder: Path, limit: int, results: multiprocessing.Queue
) -> None:
    """Copy slowly, and report the shards that this process has actually read."""
    import prelora_ds.data.cache as module

    opened, opener = [], module.open_location

    def slow(place: str) -> object:
        opened.append(Path(place).name)
        time.sleep(0.1)
        return opener(place)

    module.open_location = slow
    stage(manifest, ShardCache(folder, limit))
    results.put(opened)
