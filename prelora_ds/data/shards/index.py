"""`prelora shards index`: the manifest of shards that others wrote."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from prelora_ds.data.manifest import MANIFEST_NAME, Manifest, is_url, save_manifest
from prelora_ds.data.parallel import map_unordered
from prelora_ds.data.shards.scan import ScannedShard, index_shard, local_shard
from prelora_ds.errors import ConfigError, ExpectedError, file_error

Progress = Callable[[int, int], None]
_MOST_SHARDS = 1_000_000
_PATTERN = "name a folder, or a pattern such as FOLDER/train-{000000..001023}.tar whose shards are all there"


class Indexed(NamedTuple):
    """A new manifest, and what a user should hear of it.

    pickled: members of samples in pickle formats, which are never decoded.
    skipped: members that belong to no sample; ``example`` is the name of the first.
    """

    manifest: Manifest
    pickled: int
    skipped: int
    example: str


def index(
    source: str,
    out: Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    label_key: str | None = None,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> Indexed:
    """Make the manifest of shards that others wrote: a folder or a brace pattern, paths or URLs.

    It is written beside the shards, or to the folder ``out``, which has to be given for a URL. Without
    ``classes`` they are those of a manifest of version 1 where there is one, and the numbers
    otherwise. For ``label_key`` see `LabelReader`.

    Raises ConfigError for a shard that is missing or has a mistake (`index_shard`) with its offset, and
    where there is a manifest already; DiskError where the disk fails.
    """
    folder, names = _shards_of(source)
    if out is None and is_url(folder):
        raise ConfigError(
            "--out", None, f"a manifest cannot be written to {folder}", "name a folder of this host"
        )
    target, key = (Path(folder), "SOURCE") if out is None else (out, "--out")
    kept = _kept_classes(target)
    classes = classes if classes is not None else kept
    _check_writable(target, key)
    found: dict[int, ScannedShard] = {}
    progress(0, len(names))
    jobs = ((number, f"{folder}/{name}", classes, label_key) for number, name in enumerate(names))
    for number, scanned in map_unordered(_index_shard, jobs, workers):
        found[number] = scanned
        progress(len(found), len(names))
    scans = [found[number] for number in range(len(names))]
    if classes is None:
        classes = tuple(map(str, range(1 + max(int(scan.rows["label"].max()) for scan in scans))))
    base: str | None = folder if is_url(folder) else str(Path(folder).resolve())
    if base == str(target.resolve()):
        base = None  # the shards lie beside the manifest
    try:
        save_manifest(
            target,
            classes,
            [scan.shard for scan in scans],
            [scan.rows for scan in scans],
            base=base,
            label_key=label_key,
        )
    except OSError as error:
        raise _unwritable(target, key, error) from error
    passed = [name for scan in scans for name in scan.skipped]
    return Indexed(
        Manifest.load(target, key),
        sum(scan.pickled for scan in scans),
        len(passed),
        passed[0] if passed else "",
    )


def _check_writable(folder: Path, key: str) -> None:
    """Raise before hours of reading, and not after them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, key, error) from error


def _unwritable(folder: Path, key: str, error: OSError) -> ExpectedError:
    return file_error(
        key,
        folder,
        error,
        "the manifest cannot be written there",
        "name a folder that this user may write with --out",
    )


def _index_shard(
    job: tuple[int, str, Sequence[str] | None, str | None],
) -> tuple[int, ScannedShard]:
    number, place, classes, label_key = job
    try:
        with local_shard(place) as path:
            scanned = index_shard(path, "SOURCE", classes=classes, label_key=label_key)
    except ConfigError as error:
        raise ConfigError("SOURCE", place, error.problem, error.remedy) from error
    except OSError as error:
        raise file_error(
            "SOURCE", place, error, "cannot be read", "look whether the shard is there"
        ) from error
    return number, scanned._replace(shard=scanned.shard._replace(name=place.rpartition("/")[2]))


def _shards_of(source: str) -> tuple[str, list[str]]:
    """(folder, names) of the shards of a folder, or of a pattern such as ``F/train-{0000..1023}.tar``."""
    if not is_url(source) and os.path.isdir(source):
        folder = source.rstrip("/") or "/"
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise file_error(
                "SOURCE", source, error, "cannot be listed", "name a folder that this user may read"
            ) from error
    elif "{" in source or source.endswith(".tar"):
        folder, names = _expanded(source)
    elif is_url(source):
        import fsspec

        folder = source.rstrip("/")
        try:
            files, root = fsspec.core.url_to_fs(folder)
            names = sorted(str(path).rpartition("/")[2] for path in files.ls(root, detail=False))
        except Exception as error:  # each protocol has its own errors
            raise ConfigError(
                "SOURCE",
                source,
                f"cannot be listed ({type(error).__name__}: {error})",
                "give a pattern: URL/shard-{000000..000123}.tar",
            ) from error
    else:
        raise ConfigError(
            "SOURCE", source, "no such folder", "name a folder of shards, or a pattern of shards"
        )
    shards = [name for name in names if name.endswith(".tar") and not name.startswith(".")]
    if packed := [name for name in names if re.search(r"\.(tar\.\w+|tgz)$", name)]:
        raise ConfigError(
            "SOURCE", source, f"{packed[0]} is compressed: samples have no place in it", "unpack it"
        )
    if not shards:
        raise ConfigError(
            "SOURCE",
            source,
            "holds no shards (.tar)",
            "name a folder of shards, or a pattern of shards",
        )
    try:
        "".join((os.path.abspath(folder), *shards)).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            "SOURCE",
            source,
            "the name of the folder or of a shard is not UTF-8, and cannot be written "
            "into a manifest",
            "rename it",
        ) from error
    return folder, shards


def _expanded(pattern: str) -> tuple[str, list[str]]:
    """(folder, names) of a brace pattern. Raises ConfigError for local shards that are not there."""
    from braceexpand import braceexpand

    try:
        places = list(islice(braceexpand(pattern), _MOST_SHARDS + 1))
    except ValueError as error:
        raise ConfigError("SOURCE", pattern, f"is not a pattern ({error})", _PATTERN) from error
    if len(places) > _MOST_SHARDS:
        raise ConfigError("SOURCE", pattern, f"names more than {_MOST_SHARDS:,} shards", _PATTERN)
    folders = {place.rpartition("/")[0] or "." for place in places}
    if len(folders) > 1:
        raise ConfigError(
            "SOURCE", pattern, "names shards of several folders", "index each folder by itself"
        )
    if len(set(places)) < len(places):
        raise ConfigError("SOURCE", pattern, "names a shard twice", "name each once")
    missing = [place for place in places if not is_url(place) and not os.path.exists(place)]
    if missing:
        raise ConfigError(
            "SOURCE",
            pattern,
            f"{len(missing)} of {len(places)} shards are not there; the first is {missing[0]!r}",
            _PATTERN,
        )
    return folders.pop(), [place.rpartition("/")[2] for place in places]


def _kept_classes(folder: Path) -> tuple[str, ...] | None:
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] == 1 and isinstance(content["classes"], list):
            return tuple(map(str, content["classes"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    # A new manifest would take damaged shards for what they should be.
    raise ConfigError(
        "SOURCE",
        str(path),
        "there is a manifest already",
        "check the shards against it with "
        "`prelora shards verify`, or remove it if the shards are what you want",
    )
