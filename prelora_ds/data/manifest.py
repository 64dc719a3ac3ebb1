"""What lies where in a folder of WebDataset shards.

A tar reader stops without a word at a damaged header, so shards are scanned once, when they are written; from then on
every read goes by the manifest, to an exact place, and a shard that is missing or of another size is an error.

Two files: ``manifest.json`` has the classes and the shards, ``index.npy`` a row of fixed size for
each sample (25 bytes, 32 MB for ImageNet), which is read from the file when it is needed.
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

MANIFEST_NAME, INDEX_NAME = "manifest.json", "index.npy"
EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # the column ``extension`` of a row counts in this
_VERSION = 2
_PROTOCOLS = "install what the protocol needs (http: aiohttp, s3: s3fs, gs: gcsfs)"
_REWRITE = (
    "copy the folder again from where it is whole, or write it again with `prelora shards build`; "
    "`prelora shards verify` lists what is damaged"
)


class Shard(NamedTuple):
    """A tar file of ``size_bytes`` with checksum ``crc32``: samples ``first`` to ``first + samples - 1``."""

    name: str
    size_bytes: int
    samples: int
    crc32: int
    first: int


@dataclass(frozen=True)
class Manifest:
    """A data set: shards in ``folder`` (a path, or a URL), and the class names that the labels 0, 1, ... stand for.

    ``index`` has a row for each sample in the order of shards and files: ``length`` bytes of image
    from ``offset`` of ``shard``, their ``crc32``, ``label`` and ``extension``. A sample's index is
    the number of its row. A pickled manifest takes the path of the index along and not the rows.

    ``label_key`` is that of the labels in .json, where `prelora shards index` was given one.
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
        """All rows, of dtype ROW, read anew. Raises DiskError."""
        return self.index.slice(0, len(self.index))

    @property
    def index_file(self) -> Path:
        return self.index.path

    @property
    def fingerprint(self) -> str:
        """What tells this data set from others, wherever it lies, in words."""
        return f"{len(self):,} samples, index {self.index_crc32:08x}"

    def shard_location(self, shard: int) -> str:
        """Path or URL of shard number ``shard``."""
        return f"{self.folder}/{self.shards[shard].name}"

    @classmethod
    def load(cls, folder: str | Path, key: str = "data.train", *, sizes: bool = True) -> Manifest:
        """Read the manifest of ``folder``, a path or an fsspec URL, and look at local shards.

        ``key`` is the setting that named the folder. Raises ConfigError for a missing folder, a missing or invalid
        manifest, an index that is not its own, no samples at all, a missing shard, and a shard of
        another size; DiskError where the disk fails. Shards of a URL are not looked at, nor any
        without ``sizes``.
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
                    "a manifest of version 1, without checksums",
                    f"run `prelora shards index {folder}` once: it reads the shards and replaces it",
                )
            manifest = _parse(folder if is_url(folder) else here, here, content)
        except FileNotFoundError as error:
            name = Path(error.filename).name
            raise ConfigError(
                key,
                str(folder),
                f"holds no {name}",
                "name a folder made by `prelora shards`, or let `prelora shards index` look through it",
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
    """Write ``index.npy`` and then, at once and whole, ``manifest.json`` into ``folder``.

    ``rows`` has those of each shard; their shard numbers are set here. ``base`` is the URL of the shards where
    they do not lie beside the manifest, ``label_key`` that of the labels in .json. Raises OSError.
    """
    for number, of_shard in enumerate(rows):
        of_shard["shard"] = number
    index, buffer = np.concatenate([np.empty(0, ROW), *rows]), io.BytesIO()
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
    replace_file(
        folder / MANIFEST_NAME, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    )


def file_crc32(path: Path) -> int:
    crc32, buffer = 0, bytearray(1 << 20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            crc32 = zlib.crc32(view[:got], crc32)
    return crc32


def _parse(folder: Path | str, here: Path, content: dict[str, Any]) -> Manifest:
    """``folder`` is what the user named, ``here`` where the two files are."""
    if content["version"] != _VERSION:
        raise ValueError(
            f"version {content['version']!r}, and this program reads version {_VERSION}"
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
        raise ValueError("a shard is named twice")
    label_key = content.get("label_key")
    if label_key is not None:
        _text(label_key, "label_key")
    base, crc32 = content.get("base"), _count(content, "index_crc32")
    index = _index(here / INDEX_NAME, crc32, first)
    place = folder if base is None else _text(base, "base")
    if not place:
        raise ValueError("base is empty")
    manifest = Manifest(place, classes, tuple(shards), crc32, index, label_key)
    for number, shard in enumerate(shards):
        if shard.samples < 1:
            raise ValueError(f"{shard.name} is empty")
        _check_rows(index.slice(shard.first, shard.samples), number, shard, len(classes))
    return manifest


def _index(path: Path, crc32: int, samples: int) -> RowFile:
    try:
        index = RowFile(path)
    except ValueError as error:
        found, problem = file_crc32(path), str(error)
    else:
        found, problem = index.crc32, ""
    if found != crc32:
        raise ValueError(
            f"{INDEX_NAME} has the checksum {found:08x} and not {crc32:08x}: damaged, "
            "or of other shards"
        )
    if problem:
        raise ValueError(f"{INDEX_NAME} {problem}")
    if len(index) != samples:
        raise ValueError(f"{INDEX_NAME} has {len(index)} rows, and the shards {samples} samples")
    if samples == 0:
        raise ValueError("no samples")
    return index


def _check_rows(rows: NDArray[np.void], number: int, shard: Shard, classes: int) -> None:
    """Raise ValueError where a row of ``shard`` points at what is not there."""
    offset, length = rows["offset"], rows["length"].astype(np.int64)
    # not offset + length, which may overflow
    outside = (offset < 0) | (offset > shard.size_bytes - length)
    if (rows["shard"] != number).any() or outside.any():
        raise ValueError(f"{shard.name}: a sample lies outside of its {shard.size_bytes} bytes")
    if rows["label"].min() < 0 or rows["label"].max() >= classes:
        raise ValueError(f"{shard.name}: a label is not of any of the {classes} classes")
    if rows["extension"].max() >= len(EXTENSIONS):
        raise ValueError(f"{shard.name}: an image is not in any of the formats {EXTENSIONS}")


def _count(content: dict[str, Any], name: str) -> int:
    value = content[name]
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {value!r:.60}, and not a whole number")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{name} is {value!r:.60}, and not a text")
    value.encode()  # a UnicodeEncodeError (a ValueError) for what cannot be written anywhere
    return value


def _file_name(value: Any) -> str:
    name = _text(value, "the name of a shard")
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not a file name")
    return name


def _check_protocol(url: str, key: str) -> None:
    """Raise ConfigError where the package that reads ``url`` is not installed."""
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
                key, file, "the manifest names this shard, and it is missing", _REWRITE
            ) from None
        except OSError as error:
            raise file_error(key, file, error, "cannot be looked at", _REWRITE) from error
        if size != shard.size_bytes:
            problem = f"the shard has {size} bytes, and {shard.size_bytes} in the manifest"
            raise ConfigError(key, file, problem, _REWRITE)


def _fetched(url: str, key: str) -> Path:
    """A folder of this host with the two files of ``url``; the index is fetched once for each content."""
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
    except (
        Exception
    ) as error:  # each protocol has its own errors, and a missing package is an ImportError
        raise ConfigError(
            key,
            url,
            f"cannot be read ({type(error).__name__}: {error})",
            f"name a folder with a manifest.json, and {_PROTOCOLS}",
        ) from error
    return here
