"""Manifest of a folder of WebDataset shards: what is stored where.

Tar readers stop silently at a damaged header, so shards are scanned once, when they are written.
After that every read uses an exact offset from the manifest, and a shard that is missing or has
another size is an error.

A manifest is two files. ``manifest.json`` contains the classes and the shards; ``index.npy``
contains one row of fixed size per sample (25 bytes, 32 MB for ImageNet), which is read from the
file when it is needed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prelora_ds.data.rows import ROW, RowFile
from prelora_ds.errors import ConfigError, ExpectedError, file_error
from prelora_ds.files import replace_file

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
# Folders that contain one folder per user.
_HOMES = ("home", "users", "user", "scratch", "work", "lus", "lustre", "gpfs", "projects", "project", "tmp")
_PARTS = ("train", "training", "val", "valid", "validation", "test")
EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # a row's ``extension`` is an index into this
_VERSION = 2
_PROTOCOLS = "install what the protocol needs (http: aiohttp, s3: s3fs, gs: gcsfs)"
_REWRITE = (
    "copy the folder again from an intact source, or write it again with `prelora shards build`; "
    "`prelora shards verify` lists what is damaged"
)


def data_name(place: str) -> str:
    """Return the name of the data at ``place``, a path, URL or pattern, without what leads there.

    It is the name of the folder, or of that folder and its parent (``imagenet/val``) if the folder is
    named after a part of a data set. A name that may be a user's is left out.
    """
    scheme, _, location = place.partition("://")
    path = location.partition("?")[0].partition("/")[2] if location else scheme
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    if parts and parts[-1].endswith(".tar"):
        del parts[-1]
    if not parts:
        return "unnamed data"
    parts = [part for i, part in enumerate(parts) if not _may_be_a_user(part, parts[i - 1] if i else "")]
    if not parts:
        return "unnamed data"
    is_part = parts[-1].lower() in _PARTS and len(parts) > 1 and parts[-2].lower() not in _HOMES
    return "/".join(parts[-2:] if is_part else parts[-1:])


def _may_be_a_user(name: str, parent: str) -> bool:
    """Whether ``name``, in a folder named ``parent``, may be the name of a user."""
    home = os.path.basename(os.path.expanduser("~"))
    return parent.lower() in _HOMES or name in (home, os.environ.get("USER"), os.environ.get("LOGNAME"))


class Shard(NamedTuple):
    """A tar file with the samples ``first`` to ``first + samples - 1`` of the data set."""

    name: str
    size_bytes: int
    samples: int
    crc32: int
    first: int


@dataclass(frozen=True)
class Manifest:
    """A data set of images in shards.

    folder: the path or URL of the shards.
    classes: the class names for the labels 0, 1, ...
    index: one row per sample, in the order of shards and of files: ``length`` bytes of image from
        ``offset`` of ``shard``, their ``crc32``, ``label`` and ``extension``. The number of a row
        identifies the sample.
    label_key: the key of the labels in .json, if `prelora shards index` was given one.

    A pickled manifest contains the path of the index and not the rows.
    """

    folder: Path | str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    index_crc32: int
    index: RowFile = field(compare=False, repr=False)
    label_key: str | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def rows(self) -> NDArray[np.void]:
        """All rows, of dtype ROW; each access reads the file. Raises DiskError."""
        return self.index.slice(0, len(self.index))

    @property
    def index_file(self) -> Path:
        """The path of ``index.npy``."""
        return self.index.path

    @property
    def fingerprint(self) -> str:
        """A text that identifies the data set independent of its location."""
        return f"{len(self):,} samples, index {self.index_crc32:08x}"

    def shard_location(self, shard: int) -> str:
        """Return the path or URL of shard number ``shard``."""
        return f"{self.folder}/{self.shards[shard].name}"

    @classmethod
    def load(cls, folder: str | Path, key: str = "data.train", *, sizes: bool = True) -> Manifest:
        """Read the manifest of ``folder``, a path or an fsspec URL.

        key: the setting that named the folder.
        sizes: whether to check that local shards exist with the right size.

        Raises ConfigError for a missing folder, a missing or invalid manifest, a mismatched index,
        a data set without samples, and a shard that is missing or has another size; DiskError if
        the disk fails.
        """
        here = _fetched(str(folder), key) if is_url(folder) else Path(folder)
        path = here / MANIFEST_NAME
        try:
            if not here.is_dir():
                raise ConfigError(
                    key, str(folder), "no such folder", "write shards there with `prelora shards`"
                )
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] == 1:
                raise ConfigError(
                    key,
                    str(path),
                    "is a manifest of version 1, which has no checksums",
                    f"run `prelora shards index {folder}` once: it reads the shards and replaces "
                    "the manifest",
                )
            manifest = _parse(folder if is_url(folder) else here, here, content)
        except FileNotFoundError as error:
            name = Path(error.filename).name
            raise ConfigError(
                key,
                str(folder),
                f"holds no {name}",
                "name a folder made by `prelora shards`, or run `prelora shards index` on it",
            ) from None
        except OSError as error:
            raise file_error(
                key,
                error.filename or str(folder),
                error,
                "cannot be read",
                "name a folder of shards that this user may read",
            ) from error
        except ExpectedError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError(
                key, str(path), f"invalid manifest ({type(error).__name__}: {error})", _REWRITE
            ) from error
        if is_url(manifest.folder):
            _check_protocol(str(manifest.folder), key)
        elif sizes:
            _check_sizes(manifest, key)
        return manifest


def is_url(folder: str | Path) -> bool:
    """Return whether ``folder`` is an fsspec URL and not a path."""
    return isinstance(folder, str) and "://" in folder


def save_manifest(
    folder: Path,
    classes: Sequence[str],
    shards: Sequence[Shard],
    rows: Sequence[NDArray[np.void]],
    *,
    base: str | None = None,
    label_key: str | None = None,
) -> None:
    """Write ``index.npy`` and then, each atomically, ``manifest.json`` into ``folder``.

    rows: the rows of each shard; this function sets their shard numbers.
    base: the path or URL of the shards, unless they are next to the manifest.
    label_key: the key of the labels in .json.

    Raises OSError.
    """
    for number, shard_rows in enumerate(rows):
        shard_rows["shard"] = number
    index = np.concatenate([np.empty(0, ROW), *rows])
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, index, version=(1, 0), allow_pickle=False)
    content = {
        "version": _VERSION,
        "samples": len(index),
        "index_crc32": zlib.crc32(buffer.getbuffer()),
        **({} if base is None else {"base": base}),
        **({} if label_key is None else {"label_key": label_key}),
        "classes": list(classes),
        "shards": [
            {name: getattr(shard, name) for name in ("name", "size_bytes", "samples", "crc32")}
            for shard in shards
        ],
    }
    replace_file(folder / INDEX_NAME, buffer.getbuffer())
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    replace_file(folder / MANIFEST_NAME, text.encode())


def file_crc32(path: Path) -> int:
    """Return the CRC-32 of a whole file. Raises OSError."""
    crc32 = 0
    buffer = bytearray(1 << 20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            crc32 = zlib.crc32(view[:size], crc32)
    return crc32


def _parse(folder: Path | str, here: Path, content: dict[str, Any]) -> Manifest:
    """Parse ``content``; ``folder`` is what the user named, and ``here`` contains the two files."""
    if content["version"] != _VERSION:
        raise ValueError(
            f"has version {content['version']!r}, this program reads version {_VERSION}"
        )
    if not isinstance(content["classes"], list):
        raise ValueError("classes is not a list")
    classes = tuple(_text(name, "a class name") for name in content["classes"])
    shards: list[Shard] = []
    first = 0
    for entry in content["shards"]:
        shards.append(
            Shard(
                _file_name(entry["name"]),
                _count(entry, "size_bytes"),
                _count(entry, "samples"),
                _count(entry, "crc32"),
                first,
            )
        )
        first += shards[-1].samples
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError("a shard is listed twice")
    label_key = content.get("label_key")
    if label_key is not None:
        _text(label_key, "label_key")
    base = content.get("base")
    crc32 = _count(content, "index_crc32")
    index = _index(here / INDEX_NAME, crc32, first)
    shard_folder = folder if base is None else _text(base, "base")
    if not shard_folder:
        raise ValueError("base is empty")
    manifest = Manifest(shard_folder, classes, tuple(shards), crc32, index, label_key)
    for number, shard in enumerate(shards):
        if shard.samples < 1:
            raise ValueError(f"{shard.name} is empty")
        _check_rows(index.slice(shard.first, shard.samples), number, shard, len(classes))
    return manifest


def _index(path: Path, crc32: int, samples: int) -> RowFile:
    try:
        index = RowFile(path)
    except ValueError as error:
        actual = file_crc32(path)
        problem = str(error)
    else:
        actual = index.crc32
        problem = ""
    if actual != crc32:
        raise ValueError(
            f"{INDEX_NAME} has checksum {actual:08x}, expected {crc32:08x} (damaged, or from other "
            "shards)"
        )
    if problem:
        raise ValueError(f"{INDEX_NAME} {problem}")
    if len(index) != samples:
        raise ValueError(f"{INDEX_NAME} has {len(index)} rows for {samples} samples")
    if samples == 0:
        raise ValueError("no samples")
    return index


def _check_rows(rows: NDArray[np.void], number: int, shard: Shard, classes: int) -> None:
    """Raise ValueError if a row of ``shard`` points outside of the shard or of the classes."""
    offset, length = rows["offset"], rows["length"].astype(np.int64)
    # offset + length could overflow
    outside = (offset < 0) | (offset > shard.size_bytes - length)
    if (rows["shard"] != number).any() or outside.any():
        raise ValueError(f"{shard.name}: a sample lies outside of its {shard.size_bytes} bytes")
    if rows["label"].min() < 0 or rows["label"].max() >= classes:
        raise ValueError(f"{shard.name}: a label is outside the {classes} classes")
    if rows["extension"].max() >= len(EXTENSIONS):
        raise ValueError(f"{shard.name}: an image has none of the formats {EXTENSIONS}")


def _count(content: dict[str, Any], name: str) -> int:
    value = content[name]
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {value!r:.60}, and must be an integer from 0 to 2**63 - 1")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{name} is {value!r:.60}, and must be a text without null bytes")
    value.encode()  # raises UnicodeEncodeError, a ValueError, for lone surrogates
    return value


def _file_name(value: Any) -> str:
    name = _text(value, "the name of a shard")
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not a file name")
    return name


def _check_protocol(url: str, key: str) -> None:
    """Raise ConfigError if the package that reads ``url`` is not installed."""
    import fsspec

    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise ConfigError(key, url, f"shards there cannot be read ({error})", _PROTOCOLS) from error


def _check_sizes(manifest: Manifest, key: str) -> None:
    for number, shard in enumerate(manifest.shards):
        file = manifest.shard_location(number)
        try:
            size = os.stat(file).st_size
        except FileNotFoundError:
            raise ConfigError(
                key, file, "this shard of the manifest is missing", _REWRITE
            ) from None
        except OSError as error:
            raise file_error(key, file, error, "cannot be accessed", _REWRITE) from error
        if size != shard.size_bytes:
            problem = f"the shard has {size} bytes, expected {shard.size_bytes}"
            raise ConfigError(key, file, problem, _REWRITE)


def _fetched(url: str, key: str) -> Path:
    """Fetch the two files of ``url`` to a folder of this host and return it.

    The index is fetched once for each content.
    """
    import fsspec

    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = home / "prelora_ds" / "manifests"
        with fsspec.open(f"{url}/{MANIFEST_NAME}") as file:
            text = file.read()
        here = cache / hashlib.sha256(url.encode() + text).hexdigest()[:32]
        here.mkdir(parents=True, exist_ok=True)
        if not (here / MANIFEST_NAME).exists():
            with fsspec.open(f"{url}/{INDEX_NAME}") as file:
                replace_file(here / INDEX_NAME, file.read())
            replace_file(here / MANIFEST_NAME, text)
    # Each protocol has its own errors, and a missing package raises ImportError.
    except Exception as error:
        raise ConfigError(
            key,
            url,
            f"cannot be read ({type(error).__name__}: {error})",
            f"name a folder with a manifest.json, and {_PROTOCOLS}",
        ) from error
    return here
