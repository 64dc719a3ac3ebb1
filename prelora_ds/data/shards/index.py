"""`prelora shards index`: creating a manifest for existing shards."""

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
_PATTERN = (
    "name a folder, or a pattern such as FOLDER/train-{000000..001023}.tar whose shards all exist"
)


class Indexed(NamedTuple):
    """A new manifest, and what is reported to the user.

    pickled: the number of members of samples in pickle formats, which are never decoded.
    skipped: the number of members that belong to no sample; ``example`` is the name of the first.
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
    """Create the manifest of existing shards: a folder or a brace pattern, paths or URLs.

    out: the folder for the manifest (default: next to the shards); required for a URL.
    classes: the class names (default: those of a manifest of version 1 if there is one, otherwise
        the numbers).
    label_key: see `LabelReader`.

    Raises ConfigError for a shard that is missing or has a mistake (see `index_shard`), with its
    offset, and if there is a manifest already; DiskError if the disk fails.
    """
    folder, names = _shards_of(source)
    if out is None and is_url(folder):
        raise ConfigError(
            "--out", None, f"a manifest cannot be written to {folder}", "name a folder of this host"
        )
    target, key = (Path(folder), "SOURCE") if out is None else (out, "--out")
    previous = _previous_classes(target)
    classes = classes if classes is not None else previous
    _check_writable(target, key)
    scanned_shards: dict[int, ScannedShard] = {}
    progress(0, len(names))
    jobs = ((number, f"{folder}/{name}", classes, label_key) for number, name in enumerate(names))
    for number, scanned in map_unordered(_index_shard, jobs, workers):
        scanned_shards[number] = scanned
        progress(len(scanned_shards), len(names))
    scans = [scanned_shards[number] for number in range(len(names))]
    if classes is None:
        largest = max(int(scan.rows["label"].max()) for scan in scans)
        classes = tuple(map(str, range(1 + largest)))
    base: str | None = folder if is_url(folder) else str(Path(folder).resolve())
    if base == str(target.resolve()):
        base = None  # the shards are next to the manifest
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
    skipped = [name for scan in scans for name in scan.skipped]
    return Indexed(
        Manifest.load(target, key),
        sum(scan.pickled for scan in scans),
        len(skipped),
        skipped[0] if skipped else "",
    )


def _check_writable(folder: Path, key: str) -> None:
    """Raise now, and not after hours of reading, if ``folder`` cannot be written."""
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
    number, location, classes, label_key = job
    try:
        with local_shard(location) as path:
            scanned = index_shard(path, "SOURCE", classes=classes, label_key=label_key)
    except ConfigError as error:
        raise ConfigError("SOURCE", location, error.problem, error.remedy) from error
    except OSError as error:
        raise file_error(
            "SOURCE", location, error, "cannot be read", "check that the shard exists"
        ) from error
    return number, scanned._replace(shard=scanned.shard._replace(name=location.rpartition("/")[2]))


def _shards_of(source: str) -> tuple[str, list[str]]:
    """Return (folder, names) of the shards in a folder or of a pattern such as ``F/{0..9}.tar``."""
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
            "SOURCE",
            source,
            f"{packed[0]} is compressed; its samples cannot be addressed",
            "unpack it",
        )
    if not shards:
        raise ConfigError(
            "SOURCE",
            source,
            "contains no shards (.tar)",
            "name a folder of shards, or a pattern of shards",
        )
    try:
        "".join((os.path.abspath(folder), *shards)).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            "SOURCE",
            source,
            "the name of the folder or of a shard is not UTF-8, and a manifest cannot contain it",
            "rename it",
        ) from error
    return folder, shards


def _expanded(pattern: str) -> tuple[str, list[str]]:
    """Return (folder, names) of a brace pattern. Raises ConfigError for missing local shards."""
    from braceexpand import braceexpand

    try:
        locations = list(islice(braceexpand(pattern), _MOST_SHARDS + 1))
    except ValueError as error:
        raise ConfigError("SOURCE", pattern, f"is not a pattern ({error})", _PATTERN) from error
    if len(locations) > _MOST_SHARDS:
        raise ConfigError("SOURCE", pattern, f"names more than {_MOST_SHARDS:,} shards", _PATTERN)
    folders = {location.rpartition("/")[0] or "." for location in locations}
    if len(folders) > 1:
        raise ConfigError(
            "SOURCE", pattern, "names shards of several folders", "index each folder separately"
        )
    if len(set(locations)) < len(locations):
        raise ConfigError("SOURCE", pattern, "lists a shard twice", "list each once")
    missing = [
        location for location in locations if not is_url(location) and not os.path.exists(location)
    ]
    if missing:
        raise ConfigError(
            "SOURCE",
            pattern,
            f"{len(missing)} of {len(locations)} shards do not exist; the first is {missing[0]!r}",
            _PATTERN,
        )
    return folders.pop(), [location.rpartition("/")[2] for location in locations]


def _previous_classes(folder: Path) -> tuple[str, ...] | None:
    """Return the classes of a manifest of version 1; raise ConfigError for a newer manifest."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] == 1 and isinstance(content["classes"], list):
            return tuple(map(str, content["classes"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    # Re-indexing would accept damaged shards as correct.
    raise ConfigError(
        "SOURCE",
        str(path),
        "there is a manifest already",
        "check the shards against it with "
        "`prelora shards verify`, or remove it if the shards are what you want",
    )
