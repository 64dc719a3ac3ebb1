"""`prelora shards verify`: comparing every byte of a folder of shards with its manifest."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prelora_ds.data.decode import UndecodableError, decode
from prelora_ds.data.manifest import EXTENSIONS, Manifest, Shard, file_crc32
from prelora_ds.data.parallel import map_unordered
from prelora_ds.data.shards.scan import index_shard, local_shard
from prelora_ds.errors import ConfigError

Progress = Callable[[int, int], None]


class Problem(NamedTuple):
    """A defect of a shard; ``sample`` (in the data set) and ``offset`` (in the shard) if known."""

    shard: str
    problem: str
    sample: int | None = None
    offset: int | None = None

    def __str__(self) -> str:
        places = [
            f"sample {self.sample}" if self.sample is not None else "",
            f"byte {self.offset}" if self.offset is not None else "",
        ]
        return ", ".join(filter(None, [self.shard, *places])) + f": {self.problem}"


@dataclass(frozen=True)
class _ShardCheck:
    location: str
    shard: Shard
    rows: NDArray[np.void]
    classes: tuple[str, ...]
    label_key: str | None
    decode: bool


def verify(
    folder: str | Path,
    *,
    decode: bool = False,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> list[Problem]:
    """Return all differences from the manifest of ``folder``, sorted by shard and offset.

    ``folder`` is a path or a URL. The checksum of the whole file finds any change; the checksums
    of the images and the structure of the tar locate it. With ``decode``, every image is decoded
    as in training, and each image that cannot be decoded is a problem too.

    Raises ConfigError if the manifest or the index itself is damaged.
    """
    manifest = Manifest.load(folder, "FOLDER", sizes=False)
    rows = manifest.rows
    checks = (
        _ShardCheck(
            manifest.shard_location(number),
            shard,
            rows[shard.first : shard.first + shard.samples].copy(),
            manifest.classes,
            manifest.label_key,
            decode,
        )
        for number, shard in enumerate(manifest.shards)
    )
    problems: list[Problem] = []
    progress(0, len(manifest.shards))
    for done, shard_problems in enumerate(map_unordered(_verify_shard, checks, workers), 1):
        problems += shard_problems
        progress(done, len(manifest.shards))
    names = {shard.name: number for number, shard in enumerate(manifest.shards)}
    return sorted(
        problems, key=lambda p: (names[p.shard], p.offset if p.offset is not None else -1)
    )


def _verify_shard(check: _ShardCheck) -> list[Problem]:
    shard, rows = check.shard, check.rows
    problem = partial(Problem, shard.name)
    try:
        with local_shard(check.location) as path:
            if path.exists() and not path.is_file():
                return [problem("is not a file")]  # reading a pipe would wait forever
            size, crc32 = path.stat().st_size, file_crc32(path)
            if (size, crc32) == (shard.size_bytes, shard.crc32):
                return list(_undecodable(path, shard, rows)) if check.decode else []
            problems: list[Problem] = []
            lost = int((rows["offset"] + rows["length"] > size).sum())
            complete_rows = rows[: len(rows) - lost]
            if size != shard.size_bytes:
                first_lost = shard.first + shard.samples - lost if lost else None
                text = f"{size} bytes, expected {shard.size_bytes}; {lost} images are lost"
                problems.append(problem(text, first_lost, min(size, shard.size_bytes)))
            problems += _wrong_checksums(path, shard, complete_rows)
            if size == shard.size_bytes:
                problems += _structure(path, check)
            if check.decode:
                problems += _undecodable(path, shard, complete_rows)
            return problems or [
                problem(
                    "the file checksum differs but all images and labels match (padding or header "
                    "metadata changed)"
                )
            ]
    except FileNotFoundError:
        return [problem("the shard is missing")]
    except OSError as error:
        return [problem(f"cannot be read ({error})")]


def _wrong_checksums(path: Path, shard: Shard, rows: NDArray[np.void]) -> Iterator[Problem]:
    """Yield the images whose checksum is not that of the manifest."""
    with path.open("rb") as file:
        for number, row in enumerate(rows):
            offset, length = int(row["offset"]), int(row["length"])
            if zlib.crc32(os.pread(file.fileno(), length, offset)) != row["crc32"]:
                text = f"the image ({length} bytes) has a wrong checksum"
                yield Problem(shard.name, text, shard.first + number, offset)


def _undecodable(path: Path, shard: Shard, rows: NDArray[np.void]) -> Iterator[Problem]:
    """Yield the images that have the right checksum and cannot be decoded."""
    with path.open("rb") as file:
        for number, row in enumerate(rows):
            offset, length = int(row["offset"]), int(row["length"])
            data = os.pread(file.fileno(), length, offset)
            if zlib.crc32(data) != row["crc32"]:
                continue
            try:
                decode(data, 3)
            except UndecodableError as error:
                yield Problem(
                    shard.name,
                    f"the image ({length} bytes) cannot be decoded: {error}",
                    shard.first + number,
                    offset,
                )


def _structure(path: Path, check: _ShardCheck) -> Iterator[Problem]:
    """Yield what a tar reader sees differently from the manifest."""
    shard, rows = check.shard, check.rows
    try:
        scanned = index_shard(path, classes=check.classes, label_key=check.label_key).rows
    except ConfigError as error:
        sample = offset = None
        if match := re.search(r"at byte (\d+)", error.problem):
            offset = int(match[1])
            before = int(np.searchsorted(rows["offset"], offset))
            sample = shard.first + min(before, len(rows) - 1)
        yield Problem(shard.name, error.problem, sample, offset)
        return
    if len(scanned) != len(rows):
        yield Problem(shard.name, f"{len(scanned)} samples, expected {len(rows)}")
        return
    scanned["shard"] = rows["shard"]
    for number in np.flatnonzero(scanned != rows):
        actual, expected = scanned[number], rows[number]
        for name in ("offset", "length", "label", "extension"):
            if actual[name] != expected[name]:
                values = [
                    EXTENSIONS[row[name]] if name == "extension" else int(row[name])
                    for row in (actual, expected)
                ]
                yield Problem(
                    shard.name,
                    f"{name} {values[0]}, expected {values[1]}",
                    shard.first + int(number),
                    int(expected["offset"]),
                )
