"""Reading the bytes of one sample, wherever its shard is, and checking their checksum."""

from __future__ import annotations

import errno
import os
import time
import zlib
from contextlib import suppress
from typing import Any, TypeVar

from prelora_ds.data.cache import ShardCache
from prelora_ds.data.manifest import Manifest, is_url
from prelora_ds.errors import ExpectedError

_Bytes = TypeVar("_Bytes", bytes, bytearray)
_OPEN_FILES = 256  # a process may open 1,024 files, and a data set has more shards than that
# Retries of a failed read: remote stores and parallel file systems have transient errors.
_TRIES = 3
_WAIT_S = 0.5
_REMEDY = "`prelora shards verify {0}` lists what is damaged; write or copy those shards again"
_UNDECODABLE = (
    "`prelora shards verify {0} --decode` lists every image that cannot be decoded; "
    "write the shards again without them"
)


class CorruptSampleError(ExpectedError, RuntimeError):
    """An image cannot be read or decoded; ``problem`` names its shard and byte offset."""

    of_one_rank = True

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem}\n  remedy: {remedy}")

    def __reduce__(self) -> tuple[type[CorruptSampleError], tuple[str, str]]:
        return type(self), (self.problem, self.remedy)


class SampleStore:
    """The samples of a manifest, read directly at their offsets.

    A read is a pread of a local shard or of the cache's copy, or a range request (fsspec) to a URL.
    """

    def __init__(self, manifest: Manifest, cache: ShardCache | None = None) -> None:
        self.manifest = manifest
        self._cache = cache
        self._remote = is_url(manifest.folder)
        self._files: dict[str, int] = {}  # path -> descriptor
        self._filesystem: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}, "_filesystem": None}

    def read(self, sample: int) -> tuple[bytes | bytearray, int]:
        """Return (image bytes, label) of a sample.

        Raises CorruptSampleError, and DiskError if the index file has changed.
        """
        offset, length, crc32, label, number, _ = self.manifest.index.row(sample)
        shard = self.manifest.shards[number]
        if self._cache is not None and (copy := self._cache.path_of_copy(shard)) is not None:
            try:
                data: bytes | bytearray = self._pread(copy, offset, length)
                if zlib.crc32(data) == crc32:
                    return data, label
            except OSError:
                pass
            # The copy is gone or damaged: read the original.
            self._forget(copy)
            with suppress(OSError):
                self._cache.discard(shard)
        try:
            data = self._original(self.manifest.shard_location(number), offset, length)
        except Exception as error:  # each protocol has its own errors
            raise self.corrupt(sample, f"{type(error).__name__}: {error}") from error
        if (actual := zlib.crc32(data)) != crc32:
            raise self.corrupt(sample, f"checksum {actual:08x}, expected {crc32:08x}")
        return data, label

    def corrupt(
        self, sample: int, problem: str, *, undecodable: bool = False
    ) -> CorruptSampleError:
        """Return the error for a sample.

        It names the shard and the offset, and the command that lists all samples of this kind.
        """
        row = self.manifest.index.row(sample)
        folder = self.manifest.folder if self._remote else self.manifest.index_file.parent
        remedy = (_UNDECODABLE if undecodable else _REMEDY).format(folder)
        return CorruptSampleError(
            f"sample {sample}, {row.length} bytes from byte {row.offset} of "
            f"{self.manifest.shard_location(row.shard)}: {problem}",
            remedy,
        )

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _original(self, location: str, offset: int, length: int) -> bytes | bytearray:
        for attempt in range(1, _TRIES + 1):
            try:
                if self._remote:
                    return self._range(location, offset, length)
                return self._pread(location, offset, length)
            except FileNotFoundError:
                raise
            except Exception as error:
                self._forget(location)
                short = isinstance(error, OSError) and error.errno == errno.ENODATA
                if attempt == _TRIES or short:
                    raise
                time.sleep(attempt * _WAIT_S)
        raise AssertionError

    def _range(self, url: str, offset: int, length: int) -> bytes:
        if self._filesystem is None:
            import fsspec

            self._filesystem = fsspec.url_to_fs(url)[0]
        data: bytes = self._filesystem.cat_file(url, start=offset, end=offset + length)
        return self._checked_length(data, length)

    def _pread(self, path: str, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        size = os.preadv(self._descriptor(path), [data], offset)
        del data[size:]
        return self._checked_length(data, length)

    @staticmethod
    def _checked_length(data: _Bytes, length: int) -> _Bytes:
        if len(data) > length:
            raise OSError(
                errno.EPROTO,
                f"got {len(data)} bytes for a range of {length}: does the server support range "
                "requests?",
            )
        if len(data) != length:
            raise OSError(errno.ENODATA, f"short read: {len(data)} bytes")
        return data

    def _descriptor(self, path: str) -> int:
        if path not in self._files:
            if len(self._files) == _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]

    def _forget(self, path: str) -> None:
        if path in self._files:
            os.close(self._files.pop(path))
