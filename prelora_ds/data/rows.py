"""``index.npy``: one row of fixed size per sample, read at its offset and never memory-mapped.

If a mapped file is truncated, the process ends with SIGBUS and without a message. A read reports
the problem and costs microseconds, and all processes of a node share the page cache as well.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prelora_ds.errors import DiskError

ROW = np.dtype(
    [
        ("offset", "<i8"),
        ("length", "<u4"),
        ("crc32", "<u4"),
        ("label", "<i4"),
        ("shard", "<i4"),
        ("extension", "u1"),
    ]
)
_PACKED = struct.Struct("<qIIiiB")  # a ROW
_HEADER = 1 << 16  # bytes; NumPy refuses longer headers, and ours has 128


class Row(NamedTuple):
    """An image: ``length`` bytes from byte ``offset`` of shard number ``shard``."""

    offset: int
    length: int
    crc32: int
    label: int
    shard: int
    extension: int


class RowFile:
    """The rows of an index file that had the checksum ``crc32`` when it was opened.

    Every read checks that the file has not changed. If its time, size or inode differs, the
    checksum is compared; if that differs too, or the file is gone, the read raises DiskError.

    A pickled copy contains the path and not the rows.
    """

    def __init__(self, path: Path) -> None:
        """Read the file once. Raises OSError, and ValueError for a file that is not an index."""
        self.path = path
        self._file: IO[bytes] | None = None
        with path.open("rb", buffering=0) as file:
            self._stamp = _stamp_of(file)
            self.crc32 = _crc32_of(file)
            header = os.pread(file.fileno(), _HEADER, 0)
            self._first, self._count = _locate_rows(header, self._stamp[1])

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def row(self, sample: int) -> Row:
        """Return the row of ``sample``. Raises IndexError, and DiskError."""
        if not 0 <= sample < self._count:
            raise IndexError(f"there is no sample {sample} among {self._count}")
        data = self._read(self._first + sample * _PACKED.size, _PACKED.size)
        return Row._make(_PACKED.unpack(data))

    def slice(self, first: int, count: int) -> NDArray[np.void]:
        """Return ``count`` rows from ``first`` on, of dtype ROW, read-only. Raises DiskError."""
        data = self._read(self._first + first * _PACKED.size, count * _PACKED.size)
        return np.frombuffer(data, ROW)

    def _read(self, offset: int, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self.path.open("rb", buffering=0)
            if (stamp := _stamp_of(self._file)) != self._stamp:
                if _crc32_of(self._file) != self.crc32:
                    raise self._changed("its content has changed")
                self._stamp = stamp
            data = _pread(self._file, size, offset)
        except OSError as error:
            self._file = None
            raise self._changed(error.strerror or str(error)) from error
        if len(data) != size:
            raise self._changed(f"it ends at byte {offset + len(data)}")
        return data

    def _changed(self, problem: str) -> DiskError:
        return DiskError(
            "data",
            str(self.path),
            f"has changed since it was opened: {problem}",
            "restore the data set, and run the same command again",
        )


def _pread(file: IO[bytes], size: int, offset: int) -> bytes:
    """Read like os.pread, which returns at most 2 GiB at once."""
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(file.fileno(), size, offset)):
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _stamp_of(file: IO[bytes]) -> tuple[int, ...]:
    stat = os.fstat(file.fileno())
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _crc32_of(file: IO[bytes]) -> int:
    """Return the CRC-32 of the whole file.

    It is read in parts: 32 MB at once would stay allocated in every process.
    """
    crc32 = 0
    offset = 0
    while part := os.pread(file.fileno(), 1 << 20, offset):
        crc32 = zlib.crc32(part, crc32)
        offset += len(part)
    return crc32


def _locate_rows(header: bytes, size: int) -> tuple[int, int]:
    """Return (byte of the first row, number of rows) in a file of ``size`` bytes.

    Raises ValueError for a file that is not an index.
    """
    file = io.BytesIO(header)
    try:
        if (version := np.lib.format.read_magic(file)) != (1, 0):
            raise ValueError(f"has version {version} of NumPy's format, expected (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    # NumPy parses the header as Python, and each way to fail has its own error.
    except Exception as error:
        raise ValueError(f"is not an index ({type(error).__name__}: {error})") from error
    rest = size - file.tell()
    if dtype != ROW or len(shape) != 1 or fortran or shape[0] * ROW.itemsize != rest:
        raise ValueError(f"has {rest} bytes, shape {shape} and dtype {dtype}, unlike an index")
    return file.tell(), shape[0]
