"""Whole shards in a folder of the node: a cache for remote shards, and staging for those of a parallel file system.

A global shuffle reads every shard on every node, a sample here and there, all the time: to fetch a shard when a sample
of it is wanted would stop training at the begin and, where the folder is too small, fetch the same shards again and
again. So nobody waits for a copy: a sample is read from the original until its shard is here, and a thread beside the
training copies the shards one after another, those that fit. Nodes begin at different shards.
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

from prelora_ds.data.manifest import Manifest, Shard, is_url

_PART = 8 << 20
_PARTIAL = ".partial"
_LOOK_AGAIN_S = 1.0


class ShardCache:
    """At most ``limit_bytes`` of shards in ``folder``, which any number of processes and runs may share.

    A copy appears whole, under a name made of its checksum, or not at all. To make room, the least recently used ones
    that are not of this data set go first; one that is being read stays readable.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._here: dict[str, str] = {}

    def path_of_copy(self, shard: Shard) -> str | None:
        """The path of the copy, if there is one."""
        if shard.name not in self._here:
            path = str(self._path(shard))
            if not os.path.exists(path):
                return None
            self._here[shard.name] = path
        return self._here[shard.name]

    def discard(self, shard: Shard) -> None:
        self._here.pop(shard.name, None)
        self._path(shard).unlink(missing_ok=True)

    def add(
        self,
        shard: Shard,
        place: str,
        keep: frozenset[str] = frozenset(),
        stop: threading.Event | None = None,
    ) -> bool:
        """Copy the shard at ``place`` (path or URL), unless it is here; False where it does not fit.

        ``keep`` names copies that may not make room. Raises OSError, and whatever the protocol of a URL raises.
        """
        path = self._path(shard)
        with self._locked():
            if path.exists():
                os.utime(path)  # used now
                return True
            if not self._make_room(shard.size_bytes, keep):
                return False
            partial = path.with_name(path.name + _PARTIAL)
            try:
                with _opened(place) as source, partial.open("wb") as target:
                    crc32 = 0
                    while part := source.read(_PART):
                        if stop is not None and stop.is_set():
                            return False
                        crc32 = zlib.crc32(part, crc32)
                        target.write(part)
                    size = target.tell()
                if (size, crc32) != (shard.size_bytes, shard.crc32):
                    raise OSError(
                        f"{place} has {size} bytes of checksum {crc32:08x}, and {shard.size_bytes} of "
                        f"{shard.crc32:08x} in the manifest"
                    )
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
        return True

    def names(self, manifest: Manifest) -> frozenset[str]:
        return frozenset(self._path(shard).name for shard in manifest.shards)

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.crc32:08x}-{shard.size_bytes}-{shard.name}"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One copy at a time on this node, whoever makes it: so the limit holds, and no shard is fetched twice."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int, keep: frozenset[str]) -> bool:
        found = []
        for file in self.folder.iterdir():
            if file.name.endswith(_PARTIAL):
                file.unlink(missing_ok=True)  # of a process that died: we have the lock
            elif not file.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    stat = file.stat()
                    found.append((stat.st_mtime, stat.st_size, file))
        total, free = sum(size for _, size, _ in found), shutil.disk_usage(self.folder).free
        for _, its_size, file in sorted(found, key=lambda entry: entry[0]):
            if total + size <= self.limit_bytes and size <= free:
                break
            if file.name not in keep:
                file.unlink(missing_ok=True)
                total, free = total - its_size, free + its_size
        return total + size <= self.limit_bytes and size <= free


class CacheFiller:
    """A thread that copies a data set's shards into the cache, until all that fit are there."""

    def __init__(self, manifest: Manifest, cache: ShardCache) -> None:
        self._manifest, self._cache, self._stop = manifest, cache, threading.Event()
        self._thread = threading.Thread(target=self._run, name="stager", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, in the middle of a shard if need be."""
        self._stop.set()
        self._thread.join()

    def join(self) -> None:
        """Wait until all is copied that fits."""
        self._thread.join()

    def _run(self) -> None:
        shards, keep = self._manifest.shards, self._cache.names(self._manifest)
        said: set[str] = set()
        begin = zlib.crc32(socket.gethostname().encode()) % len(shards)
        for number in [*range(begin, len(shards)), *range(begin)]:
            if self._stop.is_set():
                return
            try:
                if not self._cache.add(
                    shards[number], self._manifest.shard_location(number), keep, self._stop
                ):
                    self._warn_full(shards[number])
                    return
            except (
                Exception
            ) as error:  # a full disk, a lost server: training goes on without the copy
                if (kind := getattr(error, "strerror", None) or type(error).__name__) not in said:
                    said.add(kind)
                    print(
                        f"warning: {self._manifest.shard_location(number)} is not copied to "
                        f"{self._cache.folder} on host {socket.gethostname()}: {error}; this is "
                        "said once",
                        file=sys.stderr,
                        flush=True,
                    )
                self._stop.wait(_LOOK_AGAIN_S)

    def _warn_full(self, shard: Shard) -> None:
        """One line a node, whose ranks share the folder."""
        if not self._stop.is_set() and os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                f"warning: {self._cache.folder} on host {socket.gethostname()} has no room for {shard.name}, of "
                f"{shard.size_bytes} bytes: what is not copied by now is read from {self._manifest.folder} for good",
                file=sys.stderr,
                flush=True,
            )


def _opened(place: str) -> Any:
    if not is_url(place):
        return open(place, "rb")
    import fsspec

    return fsspec.open(place, "rb").open()
