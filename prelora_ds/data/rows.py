"""``index.npy``: a row of fixed size for each sample, read at its place and never mapped.

A file that is cut while it is mapped ends the process with SIGBUS, and no message. A read tells
what is wrong, costs microseconds, and all processes of a node share the pages just the same.
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
_HEADER = 1 << 16  # bytes; NumPy refuses longer ones, and ours has 128


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

    Every read looks whether the file is still that one. Where its time, size or inode is another,
    its checksum is compared; where this differs too, or the file is gone, DiskError is raised.

    A pickled copy takes the path along, and not the rows.
    """

    def __init__(self, path: Path) -> None:
        """Read the file once. Raises OSError, and ValueError for one that does not hold rows."""
        self.path = path
        self._file: IO[bytes] | None = None
        with path.open("rb", buffering=0) as file:
            self._stamp, self.crc32 = _stamp_of(file), _crc32_of(file)
            self._first, self._count = _place_of_rows(
                os.pread(file.fileno(), _HEADER, 0), self._stamp[1]
            )

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def row(self, sample: int) -> Row:
        """That of ``sample``. Raises IndexError, and DiskError."""
        if not 0 <= sample < self._count:
            raise IndexError(f"there is no sample {sample} among {self._count}")
        return Row._make(
            _PACKED.unpack(self._read(self._first + sample * _PACKED.size, _PACKED.size))
        )

    def slice(self, first: int, count: int) -> NDArray[np.void]:
        """``count`` rows from ``first`` on, of dtype ROW, read-only. Raises DiskError."""
        return np.frombuffer(
            self._read(self._first + first * _PACKED.size, count * _PACKED.size), ROW
        )

    def _read(self, place: int, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self.path.open("rb", buffering=0)
            if (stamp := _stamp_of(self._file)) != self._stamp:
                if _crc32_of(self._file) != self.crc32:
                    raise self._changed("its content is another")
                self._stamp = stamp
            data = _pread(self._file, size, place)
        except OSError as error:
            self._file = None
            raise self._changed(error.strerror or str(error)) from error
        if len(data) != size:
            raise self._changed(f"it ends at byte {place + len(data)}")
        return data

    def _changed(self, problem: str) -> DiskError:
        return DiskError(
            "data",
            str(self.path),
            f"is not as it was when it was opened: {problem}",
            "put the data set back as it was, and run the same command again",
        )


def _pread(file: IO[bytes], size: int, place: int) -> bytes:
    """As os.pread, which gives no more than 2 GiB at once."""
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(file.fileno(), size, place)):
        parts.append(part)
        size, place = size - len(part), place + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _stamp_of(file: IO[bytes]) -> tuple[int, ...]:
    stat = os.fstat(file.fileno())
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _crc32_of(file: IO[bytes]) -> int:
    """Of all of it, in parts: 32 MB at once would stay with every process."""
    crc32, place = 0, 0
    while part := os.pread(file.fileno(), 1 << 20, place):
        crc32, place = zlib.crc32(part, crc32), place + len(part)
    return crc32


def _place_of_rows(header: bytes, size: int) -> tuple[int, int]:
    """(byte of the first row, number of rows) in a file of ``size`` bytes. Raises ValueError."""
    file = io.BytesIO(header)
    try:
        if (version := np.lib.format.read_magic(file)) != (1, 0):
            raise ValueError(f"is of version {version} of NumPy's format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (
        Exception
    ) as error:  # NumPy reads the header as Python, and each way to fail has its own error
        raise ValueError(f"is not an index ({type(error).__name__}: {error})") from error
    rest = size - file.tell()
    if dtype != ROW or len(shape) != 1 or fortran or shape[0] * ROW.itemsize != rest:
        raise ValueError(f"has {rest} bytes for rows {shape} of {dtype}")
    return file.tell(), shape[0]
