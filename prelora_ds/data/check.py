"""`prelora shards verify` and `prelora shards index`: every byte of a folder of shards, read once."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prelora_ds.core.errors import ConfigError
from prelora_ds.data.manifest import EXTENSIONS, MANIFEST_NAME, Manifest, Shard, file_crc32, is_url, save_manifest
from prelora_ds.data.parallel import unordered
from prelora_ds.data.scan import ScannedShard, index_shard

Progress = Callable[[int, int], None]


class Problem(NamedTuple):
    """What is wrong with a shard; ``sample`` (in the whole data set) and ``offset`` (in the shard) where that is known.
    """

    shard: str
    problem: str
    sample: int | None = None
    offset: int | None = None

    def __str__(self) -> str:
        places = [f"sample {self.sample}" if self.sample is not None else "",
                  f"byte {self.offset}" if self.offset is not None else ""]
        return ", ".join(filter(None, [self.shard, *places])) + f": {self.problem}"


@dataclass(frozen=True)
class _ShardCheck:
    place: str
    shard: Shard
    rows: NDArray[np.void]


def verify(folder: str | Path, *, workers: int = 1, progress: Progress = lambda done, total: None) -> list[Problem]:
    """All that differs from the manifest of ``folder``, a path or a URL; in the order of shards and offsets.

    The checksum of the whole file finds any change; those of the images, and the structure of the tar, tell where.
    Raises ConfigError where the manifest or the index itself is damaged.
    """
    manifest = Manifest.load(folder, "FOLDER", sizes=False)
    checks = [_ShardCheck(manifest.place(number), shard, manifest.rows[shard.first:shard.first + shard.samples].copy())
              for number, shard in enumerate(manifest.shards)]
    problems: list[Problem] = []
    progress(0, len(checks))
    for done, found in enumerate(unordered(_verify_shard, iter(checks), workers), 1):
        problems += found
        progress(done, len(checks))
    names = {shard.name: number for number, shard in enumerate(manifest.shards)}
    return sorted(problems, key=lambda p: (names[p.shard], p.offset if p.offset is not None else -1))


def _verify_shard(check: _ShardCheck) -> list[Problem]:
    shard, rows = check.shard, check.rows
    problem = partial(Problem, shard.name)
    try:
        with _local(check.place) as path:
            size, crc32 = path.stat().st_size, file_crc32(path)
            if (size, crc32) == (shard.size_bytes, shard.crc32):
                return []
            found: list[Problem] = []
            lost = int((rows["offset"] + rows["length"] > size).sum())
            if size != shard.size_bytes:
                found.append(problem(f"{size} bytes, and {shard.size_bytes} in the manifest; {lost} images are lost",
                                     shard.first + shard.samples - lost if lost else None,
                                     min(size, shard.size_bytes)))
            with path.open("rb") as file:
                for number, row in enumerate(rows[:len(rows) - lost]):
                    offset, length = int(row["offset"]), int(row["length"])
                    if zlib.crc32(os.pread(file.fileno(), length, offset)) != row["crc32"]:
                        found.append(problem(f"the image ({length} bytes) has another checksum", shard.first + number,
                                             offset))
            if size == shard.size_bytes:
                found += _structure(path, shard, rows)
            return found or [problem("the checksum of the file differs, and no image or label does: padding, or a "
                                     "header's owner, time or mode")]
    except FileNotFoundError:
        return [problem("the shard is missing")]
    except OSError as error:
        return [problem(f"cannot be read ({error})")]


def _structure(path: Path, shard: Shard, rows: NDArray[np.void]) -> Iterator[Problem]:
    """What a tar reader would see otherwise than the manifest."""
    try:
        now = index_shard(path).rows
    except ConfigError as error:
        place = re.search(r"at byte (\d+)", error.problem)
        offset = int(place[1]) if place else None
        before = None if offset is None else int(np.searchsorted(rows["offset"], offset))
        yield Problem(shard.name, error.problem, None if before is None else shard.first + min(before, len(rows) - 1),
                      offset)
        return
    if len(now) != len(rows):
        yield Problem(shard.name, f"{len(now)} samples, and {len(rows)} in the manifest")
        return
    now["shard"] = rows["shard"]
    for number in np.flatnonzero(now != rows):
        row, was = now[number], rows[number]
        for name in ("offset", "length", "label", "extension"):
            if row[name] != was[name]:
                values = [EXTENSIONS[of[name]] if name == "extension" else int(of[name]) for of in (row, was)]
                yield Problem(shard.name, f"{name} {values[0]}, and {values[1]} in the manifest",
                              shard.first + int(number), int(was["offset"]))


class Indexed(NamedTuple):
    """``pickled``: members in pickle formats, which are passed over and never decoded."""

    manifest: Manifest
    pickled: int


def index(source: str, out: Path | None = None, *, classes: Sequence[str] | None = None, label_key: str = "label",
          workers: int = 1, progress: Progress = lambda done, total: None) -> Indexed:
    """Make the manifest of shards that others wrote: a folder or a brace pattern, of paths or of URLs.

    It is written beside the shards, or to the folder ``out``, which has to be given for a URL. ``classes`` are taken
    from a manifest of version 1 where there is one, and are the numbers else. Raises ConfigError for a shard with a
    mistake (`index_shard`) with its offset, for a label of no class, and where there is a manifest already.
    """
    folder, names = _shards_of(source)
    if out is None and is_url(folder):
        raise ConfigError("--out", None, f"a manifest cannot be written to {folder}", "name a folder of this host")
    target = Path(folder) if out is None else out
    kept = _kept_classes(target)
    classes = classes if classes is not None else kept
    target.mkdir(parents=True, exist_ok=True)
    found: dict[int, ScannedShard] = {}
    progress(0, len(names))
    jobs = ((number, f"{folder}/{name}", classes, label_key) for number, name in enumerate(names))
    for number, scanned in unordered(_index_shard, jobs, workers):
        found[number] = scanned
        progress(len(found), len(names))
    scans = [found[number] for number in range(len(names))]
    if classes is None:
        classes = tuple(map(str, range(1 + max(int(scan.rows["label"].max()) for scan in scans))))
    base = None if target.resolve() == Path(folder).resolve() and not is_url(folder) else \
        folder if is_url(folder) else str(Path(folder).resolve())
    save_manifest(target, classes, [scan.shard for scan in scans], [scan.rows for scan in scans], base=base)
    return Indexed(Manifest.load(target, "OUT"), sum(scan.pickled for scan in scans))


def _index_shard(job: tuple[int, str, Sequence[str] | None, str]) -> tuple[int, ScannedShard]:
    number, place, classes, label_key = job
    with _local(place) as path:
        try:
            scanned = index_shard(path, "SOURCE", classes=classes, label_key=label_key)
        except ConfigError as error:
            raise ConfigError("SOURCE", place, error.problem, error.remedy) from error
    return number, scanned._replace(shard=scanned.shard._replace(name=place.rpartition("/")[2]))


def _shards_of(source: str) -> tuple[str, list[str]]:
    """(folder, names) of the shards of a folder or of a pattern such as ``FOLDER/train-{0000..1023}.tar``."""
    if "{" in source or source.endswith(".tar"):
        from braceexpand import braceexpand

        places = list(braceexpand(source))
        folders = {place.rpartition("/")[0] or "." for place in places}
        if len(folders) > 1:
            raise ConfigError("SOURCE", source, "names shards of several folders", "index each folder by itself")
        folder, names = folders.pop(), [place.rpartition("/")[2] for place in places]
    elif is_url(source):
        import fsspec

        folder = source.rstrip("/")
        try:
            files, root = fsspec.core.url_to_fs(folder)
            names = sorted(str(path).rpartition("/")[2] for path in files.ls(root, detail=False))
        except Exception as error:  # each protocol has its own errors
            raise ConfigError("SOURCE", source, f"cannot be listed ({type(error).__name__}: {error})",
                              "give a pattern: URL/shard-{000000..000123}.tar") from error
    else:
        folder = source.rstrip("/") or "/"
        if not Path(folder).is_dir():
            raise ConfigError("SOURCE", source, "no such folder", "name a folder of shards, or a pattern of shards")
        names = sorted(path.name for path in Path(folder).iterdir())
    shards = [name for name in names if name.endswith(".tar") and not name.startswith(".")]
    if packed := [name for name in names if re.search(r"\.(tar\.\w+|tgz)$", name)]:
        raise ConfigError("SOURCE", source, f"{packed[0]} is compressed: samples have no place in it", "unpack it")
    if not shards:
        raise ConfigError("SOURCE", source, "holds no shards (.tar)", "name a folder of shards, or a pattern of shards")
    if len(set(shards)) < len(shards):
        raise ConfigError("SOURCE", source, "names a shard twice", "name each once")
    return folder, shards


def _kept_classes(folder: Path) -> tuple[str, ...] | None:
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] == 1:
            return tuple(map(str, content["classes"]))
    except (ValueError, KeyError, TypeError):
        pass
    # A new manifest would take damaged shards for what they should be.
    raise ConfigError("SOURCE", str(path), "there is a manifest already", "check the shards against it with "
                      "`prelora shards verify`, or remove it if the shards are what you want")


@contextmanager
def _local(place: str) -> Iterator[Path]:
    """The shard as a file of this host; a remote one is there while the context is."""
    if not is_url(place):
        yield Path(place)
        return
    import fsspec

    with tempfile.TemporaryDirectory(prefix="prelora-") as folder:
        path = Path(folder) / place.rpartition("/")[2]
        try:
            with fsspec.open(place, "rb") as remote, path.open("wb") as file:
                shutil.copyfileobj(remote, file, 1 << 20)
        except Exception as error:  # each protocol has its own errors
            raise OSError(f"{place}: {type(error).__name__}: {error}") from error
        yield path
