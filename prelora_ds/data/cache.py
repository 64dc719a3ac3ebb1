"""Copies of whole shards in a folder of the node.

The folder is a cache for remote shards, and staging for those of a parallel file system.

With a global shuffle every node reads single samples from every shard, all the time. Fetching a
shard when a sample of it is needed would stall training at the start and, with too small a folder,
fetch the same shards again and again. Hence no reader ever waits for a copy: a sample is read from
the original until a copy of its shard exists, and a background thread copies the shards that fit,
one after another. Nodes begin at different shards.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prelora_ds.console import stamped
from prelora_ds.data.manifest import Manifest, Shard, is_url

_CHUNK_BYTES = 8 << 20
_PARTIAL = ".partial"
_PAUSE_AFTER_ERROR_S = 1.0


class ShardCache:
    """At most ``limit_bytes`` of shards in ``folder``, shared by any number of processes and runs.

    A copy appears atomically, under a name that contains its checksum. To make room, the least
    recently used copies that are not of this data set are removed; a copy that is being read
    stays readable.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self._copies: dict[str, str] = {}  # name of a shard -> path of its copy

    def path_of_copy(self, shard: Shard) -> str | None:
        """Return the path of the copy, if there is one."""
        if shard.name not in self._copies:
            path = str(self._path(shard))
            if not os.path.exists(path):
                return None
            self._copies[shard.name] = path
        return self._copies[shard.name]

    def discard(self, shard: Shard) -> None:
        """Remove the copy, if there is one. Raises OSError."""
        self._copies.pop(shard.name, None)
        self._path(shard).unlink(missing_ok=True)

    def add(
        self,
        shard: Shard,
        location: str,
        keep: frozenset[str] = frozenset(),
        stop: threading.Event | None = None,
    ) -> bool:
        """Copy the shard at ``location`` (path or URL), unless there is a copy already.

        keep: names of copies that must not be evicted.
        stop: gives up the copy when it is set.

        Returns False if the shard does not fit, and after ``stop``. Raises OSError, and whatever
        the protocol of a URL raises.
        """
        path = self._path(shard)
        with self._locked():
            if path.exists():
                os.utime(path)  # mark as recently used
                return True
            if not self._make_room(shard.size_bytes, keep):
                return False
            partial = path.with_name(path.name + _PARTIAL)
            try:
                with open_location(location) as source, partial.open("wb") as target:
                    crc32 = 0
                    while part := source.read(_CHUNK_BYTES):
                        if stop is not None and stop.is_set():
                            return False
                        crc32 = zlib.crc32(part, crc32)
                        target.write(part)
                    size = target.tell()
                if (size, crc32) != (shard.size_bytes, shard.crc32):
                    raise OSError(
                        f"{location} has {size} bytes with checksum {crc32:08x}, expected "
                        f"{shard.size_bytes} bytes with checksum {shard.crc32:08x}"
                    )
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
        return True

    def names(self, manifest: Manifest) -> frozenset[str]:
        """Return the names that copies of the shards have in the folder."""
        return frozenset(self._path(shard).name for shard in manifest.shards)

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.crc32:08x}-{shard.size_bytes}-{shard.name}"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder.

        All processes of the node together make one copy at a time: so the limit holds, and no
        shard is fetched twice.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int, keep: frozenset[str]) -> bool:
        """Evict copies until ``size`` bytes fit; return whether they do. Needs the lock."""
        copies = []
        for file in self.folder.iterdir():
            if file.name.endswith(_PARTIAL):
                file.unlink(missing_ok=True)  # left by a dead process: we hold the lock
            elif not file.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    stat = file.stat()
                    copies.append((stat.st_mtime, stat.st_size, file))
        total = sum(copy_size for _, copy_size, _ in copies)
        free = shutil.disk_usage(self.folder).free
        for _, copy_size, file in sorted(copies, key=lambda entry: entry[0]):
            if total + size <= self.limit_bytes and size <= free:
                break
            if file.name not in keep:
                file.unlink(missing_ok=True)
                total -= copy_size
                free += copy_size
        return total + size <= self.limit_bytes and size <= free


class CacheFiller:
    """A thread that copies the shards of a data set into the cache until no more fit."""

    def __init__(self, manifest: Manifest, cache: ShardCache) -> None:
        self._manifest = manifest
        self._cache = cache
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cache filler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, even in the middle of a shard."""
        self._stop.set()
        self._thread.join()

    def join(self) -> None:
        """Wait until all shards that fit are copied."""
        self._thread.join()

    def _run(self) -> None:
        shards = self._manifest.shards
        keep = self._cache.names(self._manifest)
        reported: set[str] = set()
        first = zlib.crc32(socket.gethostname().encode()) % len(shards)
        for number in [*range(first, len(shards)), *range(first)]:
            if self._stop.is_set():
                return
            location = self._manifest.shard_location(number)
            try:
                if not self._cache.add(shards[number], location, keep, self._stop):
                    self._warn_full(shards[number])
                    return
            # For example a full disk or a lost server: training continues without the copy.
            except Exception as error:
                kind = getattr(error, "strerror", None) or type(error).__name__
                if kind not in reported:
                    reported.add(kind)
                    _warn(
                        f"{location} is not copied to {self._cache.folder} on host "
                        f"{socket.gethostname()}: {error}; further errors of this kind are not "
                        "reported"
                    )
                self._stop.wait(_PAUSE_AFTER_ERROR_S)

    def _warn_full(self, shard: Shard) -> None:
        """Print one warning per node, whose ranks share the folder."""
        if not self._stop.is_set() and os.environ.get("LOCAL_RANK", "0") == "0":
            _warn(
                f"{self._cache.folder} on host {socket.gethostname()} is full "
                f"({shard.name} needs {shard.size_bytes} bytes): the remaining shards will be read "
                f"from {self._manifest.folder}"
            )


def _warn(text: str) -> None:
    print(stamped(f"warning: {text}"), file=sys.stderr, flush=True)


def open_location(location: str) -> Any:
    if not is_url(location):
        return open(location, "rb")
    import fsspec

    return fsspec.open(location, "rb").open()
