"""What every kind of source comes down to: a list of images, each with a label and a place."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prelora_ds.core.errors import ConfigError

# ``length`` bytes from ``offset`` of file number ``file``; some kinds count rows there. ``block``: what is read as one.
ITEM = np.dtype([("file", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("length", "<i8"), ("block", "<i4")])


@dataclass(frozen=True)
class Listing:
    """The images of a source, of dtype ITEM, in a fixed order. ``kind`` chooses the reader.

    ``classes`` is None where the source knows its classes by number alone. ``passed_over`` says what is in the source
    and is no image of it.
    """

    kind: str
    classes: tuple[str, ...] | None
    files: tuple[str, ...]
    items: NDArray[np.void]
    passed_over: str = ""


@dataclass(frozen=True)
class Request:
    """What the user asked for: ``labels`` is a file of labels that the source lacks."""

    source: Path
    split: str | None = None
    labels: Path | None = None


def items(file: Any, label: Any, offset: Any, length: Any, block: Any = 0) -> NDArray[np.void]:
    """Rows of dtype ITEM, broadcast from columns."""
    columns = np.broadcast_arrays(*map(np.asarray, (file, label, offset, length, block)))
    rows = np.zeros(columns[0].shape, ITEM)
    for name, column in zip(ITEM.names or (), columns, strict=True):
        rows[name] = column
    return rows


def choose_split(found: Sequence[str], request: Request) -> str:
    """The split asked for, or the only one. Raises ConfigError for none, and for one of many."""
    if not found:
        raise broken(request.source, "holds none of the files that this format has")
    if request.split is None and len(found) == 1:
        return found[0]
    if request.split is None or request.split not in found:
        raise ConfigError("--split", request.split, f"{request.source} has the splits {', '.join(sorted(found))}",
                          "give one of these")
    return request.split


def broken(path: str | Path, problem: str) -> ConfigError:
    return ConfigError("SOURCE", str(path), problem, "mend or fetch the source again")


def read_range(file: str, offset: int, length: int) -> bytes:
    """``length`` bytes, or all from ``offset`` on for -1. Raises ValueError for fewer."""
    with open(file, "rb") as opened:
        opened.seek(offset)
        data = opened.read(length)
    if len(data) < length:
        raise ValueError(f"only {len(data)} of {length} bytes there")
    return data


def read_whole(path: Path) -> bytes:
    """A file, unpacked where it is gzip. Raises ConfigError."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise broken(path, f"cannot be read ({error})") from error
