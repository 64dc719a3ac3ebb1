"""`prelora shards verify`: every byte of a folder of shards, held against its manifest."""

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
    place: str
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
    """All that differs from the manifest of ``folder``, a path or a URL; in the order of shards and offsets.

    The checksum of the whole file finds any change; those of the images, and the structure of the tar, tell where.
    With ``decode`` every image is decoded as training does it; one that cannot be is a problem too.
    Raises ConfigError where the manifest or the index itself is damaged.
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
    for done, found in enumerate(map_unordered(_verify_shard, checks, workers), 1):
        problems += found
        progress(done, len(manifest.shards))
    names = {shard.name: number for number, shard in enumerate(manifest.shards)}
    return sorted(
        problems, key=lambda p: (names[p.shard], p.offset if p.offset is not None else -1)
    )


def _verify_shard(check: _ShardCheck) -> list[Problem]:
    shard, rows = check.shard, check.rows
    problem = partial(Problem, shard.name)
    try:
        with local_shard(check.place) as path:
            if path.exists() and not path.is_file():
                return [problem("is not a file")]  # to read a pipe would wait for ever
            size, crc32 = path.stat().st_size, file_crc32(path)
            if (size, crc32) == (shard.size_bytes, shard.crc32):
                return list(_undecodable(path, shard, rows)) if check.decode else []
            found: list[Problem] = []
            lost = int((rows["offset"] + rows["length"] > size).sum())
            if size != shard.size_bytes:
                found.append(
                    problem(
                        f"{size} bytes, and {shard.size_bytes} in the manifest; {lost} images are lost",
                        shard.first + shard.samples - lost if lost else None,
                        min(size, shard.size_bytes),
                    )
                )
            with path.open("rb") as file:
                for number, row in enumerate(rows[: len(rows) - lost]):
                    offset, length = int(row["offset"]), int(row["length"])
                    if zlib.crc32(os.pread(file.fileno(), length, offset)) != row["crc32"]:
                        found.append(
                            problem(
                                f"the image ({length} bytes) has another checksum",
                                shard.first + number,
                                offset,
                            )
                        )
            if size == shard.size_bytes:
                found += _structure(path, check)
            if check.decode:
                found += _undecodable(path, shard, rows[: len(rows) - lost])
            return found or [
                problem(
                    "the checksum of the file differs, and no image or label does: padding, or a "
                    "header's owner, time or mode"
                )
            ]
    except FileNotFoundError:
        return [problem("the shard is missing")]
    except OSError as error:
        return [problem(f"cannot be read ({error})")]


def _undecodable(path: Path, shard: Shard, rows: NDArray[np.void]) -> Iterator[Problem]:
    """The images that have the right checksum, and cannot be decoded."""
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
    """What a tar reader would see otherwise than the manifest."""
    shard, rows = check.shard, check.rows
    try:
        now = index_shard(path, classes=check.classes, label_key=check.label_key).rows
    except ConfigError as error:
        place = re.search(r"at byte (\d+)", error.problem)
        offset = int(place[1]) if place else None
        before = None if offset is None else int(np.searchsorted(rows["offset"], offset))
        yield Problem(
            shard.name,
            error.problem,
            None if before is None else shard.first + min(before, len(rows) - 1),
            offset,
        )
        return
    if len(now) != len(rows):
        yield Problem(shard.name, f"{len(now)} samples, and {len(rows)} in the manifest")
        return
    now["shard"] = rows["shard"]
    for number in np.flatnonzero(now != rows):
        row, was = now[number], rows[number]
        for name in ("offset", "length", "label", "extension"):
            if row[name] != was[name]:
                values = [
                    EXTENSIONS[of[name]] if name == "extension" else int(of[name])
                    for of in (row, was)
                ]
                yield Problem(
                    shard.name,
                    f"{name} {values[0]}, and {values[1]} in the manifest",
                    shard.first + int(number),
                    int(was["offset"]),
                )
