"""The bytes of one sample, from wherever its shard is, held against their checksum."""

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
_TRIES, _WAIT_S = (
    3,
    0.5,
)  # of a read that fails: remote stores and parallel file systems have bad moments
_REMEDY = "`prelora shards verify {0}` lists what is damaged; write or copy those shards again"
_UNDECODABLE = (
    "`prelora shards verify {0} --decode` lists every image that cannot be decoded; "
    "write the shards again without them"
)


class CorruptSampleError(ExpectedError, RuntimeError):
    """An image that cannot be read or decoded: ``problem`` names its shard and byte offset."""

    of_one_rank = True

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem}\n  remedy: {remedy}")

    def __reduce__(self) -> tuple[type[CorruptSampleError], tuple[str, str]]:
        return type(self), (self.problem, self.remedy)


class SampleStore:
    """Reads by place: pread from a file, a range request (fsspec) from a URL, or from the cache's copy of the shard."""

    def __init__(self, manifest: Manifest, cache: ShardCache | None = None) -> None:
        self.manifest = manifest
        self._cache = cache
        self._remote = is_url(manifest.folder)
        self._files: dict[str, int] = {}  # path -> descriptor
        self._filesystem: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}, "_filesystem": None}

    def read(self, sample: int) -> tuple[bytes | bytearray, int]:
        """(image bytes, label) of sample ``sample``.

        Raises CorruptSampleError, and DiskError where the index is not what it was.
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
            self._forget(copy)  # the copy is gone or bad: the original counts
            with suppress(OSError):
                self._cache.discard(shard)
        try:
            data = self._original(self.manifest.shard_location(number), offset, length)
        except Exception as error:  # each protocol has its own errors
            raise self.corrupt(sample, f"{type(error).__name__}: {error}") from error
        if (found := zlib.crc32(data)) != crc32:
            raise self.corrupt(sample, f"checksum {found:08x}, and {crc32:08x} in the manifest")
        return data, label

    def corrupt(
        self, sample: int, problem: str, *, undecodable: bool = False
    ) -> CorruptSampleError:
        """The error that names the place of ``sample``, and the command that finds all like it."""
        row, folder = self.manifest.index.row(sample), self.manifest.folder
        remedy = (_UNDECODABLE if undecodable else _REMEDY).format(
            folder if self._remote else self.manifest.index_file.parent
        )
        return CorruptSampleError(
            f"sample {sample}, {row.length} bytes from byte {row.offset} of "
            f"{self.manifest.shard_location(row.shard)}: {problem}",
            remedy,
        )

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _original(self, place: str, offset: int, length: int) -> bytes | bytearray:
        for attempt in range(1, _TRIES + 1):
            try:
                return (
                    self._range(place, offset, length)
                    if self._remote
                    else self._pread(place, offset, length)
                )
            except FileNotFoundError:
                raise
            except Exception as error:
                self._forget(place)
                if attempt == _TRIES or (
                    isinstance(error, OSError) and error.errno == errno.ENODATA
                ):
                    raise
                time.sleep(attempt * _WAIT_S)
        raise AssertionError

    def _range(self, url: str, offset: int, length: int) -> bytes:
        if self._filesystem is None:
            import fsspec

            self._filesystem = fsspec.url_to_fs(url)[0]
        data: bytes = self._filesystem.cat_file(url, start=offset, end=offset + length)
        return self._whole(data, length)

    def _pread(self, path: str, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        got = os.preadv(self._descriptor(path), [data], offset)
        del data[got:]
        return self._whole(data, length)

    @staticmethod
    def _whole(data: _Bytes, length: int) -> _Bytes:
        if len(data) > length:
            raise OSError(
                errno.EPROTO,
                f"{len(data)} bytes came for {length} asked for: does its server know ranges?",
            )
        if len(data) != length:
            raise OSError(errno.ENODATA, f"only {len(data)} bytes there")
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
