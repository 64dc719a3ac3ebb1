"""Reading files that others wrote.

The errors for damaged, hostile and inaccessible files name the file.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from prelora_ds.errors import ConfigError, ExpectedError, file_error

MAX_IMAGE_BYTES = 1 << 30
MAX_TEXT_BYTES = 1 << 28
MAX_UNPACKED_BYTES = 1 << 31  # EMNIST, the largest of its kind, has 0.6 GB
AGAIN = "run the same command again: it continues where it stopped"
_CHECK = "check the file, and fetch it again if it is damaged"
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"7z\xbc\xaf\x27\x1c": ("7z", "7z x"),
    b"Rar!": ("rar", "unrar x"),
}


def broken(
    path: str | Path, problem: str, remedy: str = "repair the source, or fetch it again"
) -> ConfigError:
    """Return the error for a file or folder of SOURCE."""
    return ConfigError("SOURCE", str(path), problem, remedy)


def not_accessible(
    key: str, path: str | Path, error: OSError, act: str = "cannot be read"
) -> ConfigError:
    """Return ConfigError for a path that the user can change, DiskError for a disk that failed."""
    return file_error(
        key, path, error, act, "make it accessible to this user, or name another path"
    )


@contextmanager
def reading(path: str | Path, what: str, key: str = "SOURCE") -> Iterator[None]:
    """A context that turns whatever a parser raises for a damaged file into a ConfigError.

    The error names the file. A disk that fails becomes a DiskError.
    """
    try:
        yield
    except ExpectedError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise not_accessible(key, error.filename or path, error) from error
        raise ConfigError(key, str(path), f"cannot be read as {what} ({error})", _CHECK) from error
    # Parsers raise anything for damaged files, MemoryError included.
    except Exception as error:
        raise ConfigError(
            key, str(path), f"cannot be read as {what} ({describe(error)})", _CHECK
        ) from error


def describe(error: Exception) -> str:
    """Return the text of an error, with its type unless the error is written for users."""
    text = str(error)[:300]
    if isinstance(error, ValueError | OSError) and text and not isinstance(error, UnicodeError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read_range(file: str, offset: int, length: int) -> bytes:
    """Read ``length`` bytes from ``offset``; a length of -1 reads to the end.

    Raises ValueError if fewer bytes exist, for more than MAX_IMAGE_BYTES, and for a device or a
    pipe, which might never end.
    """
    check_regular(file)
    with open(file, "rb") as opened:
        opened.seek(offset)
        data = opened.read(length if 0 <= length <= MAX_IMAGE_BYTES else MAX_IMAGE_BYTES + 1)
    if len(data) > MAX_IMAGE_BYTES or length > MAX_IMAGE_BYTES:
        raise ValueError(f"more than {MAX_IMAGE_BYTES:,} bytes, which is the limit for one image")
    if len(data) < length:
        raise ValueError(f"only {len(data)} of {length} bytes exist")
    return data


def read_whole(path: Path) -> bytes:
    """Read a whole file, unpacked if it is gzip.

    Raises ConfigError, also if a small file unpacks to more than MAX_UNPACKED_BYTES.
    """
    with reading(path, "a packed file" if path.suffix == ".gz" else "a file"):
        check_regular(path)
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            data = file.read(MAX_UNPACKED_BYTES + 1)
        if len(data) > MAX_UNPACKED_BYTES:
            raise ValueError(
                f"more than {MAX_UNPACKED_BYTES:,} bytes when it is unpacked; if that is intended, "
                "unpack it with gunzip"
            )
        return data


def read_text(path: Path, key: str = "SOURCE") -> str:
    """Read a UTF-8 text file without its byte-order mark. Raises ConfigError for other files."""
    with reading(path, "text", key):
        check_regular(path)
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise ValueError(f"more than {MAX_TEXT_BYTES:,} bytes")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(
                key,
                str(path),
                f"is not UTF-8 text (byte {error.start})",
                "convert it, for example with iconv -t UTF-8",
            ) from error


def check_regular(path: str | Path) -> None:
    """Raise ValueError for a pipe or a device, where reading may wait or never end."""
    mode = os.stat(path).st_mode
    if not S_ISREG(mode) and not S_ISDIR(mode):  # opening a folder fails anyway
        raise ValueError("a pipe or a device, and not a file or a folder")


def version(path: str | Path) -> tuple[int, int, int]:
    """Return a value that changes with the file's content; caches use it in their keys."""
    stat = os.stat(path)
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def packing(path: Path) -> tuple[str, str] | None:
    """Return (name of the format, command that unpacks it) for a packed file, otherwise None."""
    with path.open("rb") as file:
        start = file.read(8)
    return next((how for magic, how in _PACKED.items() if start.startswith(magic)), None)
