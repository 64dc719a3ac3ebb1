"""What lies where in a folder of WebDataset shards.

A tar reader stops without a word at a damaged header, so shards are scanned once, when they are written; from then on
every read goes by the manifest, to an exact place, and a shard that is missing or of another size is an error.

Two files: ``manifest.json`` has the classes and the shards, ``index.npy`` a row of fixed size for each sample. The
index is mapped and not read: its pages are shared by all processes of a node (25 bytes a sample, 32 MB for ImageNet).
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
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from prelora_ds.core.errors import ConfigError

MANIFEST_NAME, INDEX_NAME = "manifest.json", "index.npy"
EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # the column ``extension`` of a row counts in this
ROW = np.dtype([("offset", "<i8"), ("length", "<u4"), ("crc32", "<u4"), ("label", "<i4"), ("shard", "<i4"),
                ("extension", "u1")])
_VERSION = 2
_REWRITE = ("copy the folder again from where it is whole, or write it again with `prelora shards build`; "
            "`prelora shards verify` lists what is damaged")


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

    ``rows``, of dtype ROW, has a row for each sample in the order of shards and files: ``length`` bytes of image from
    ``offset`` of ``shard``, their ``crc32``, ``label`` and ``extension``. A sample's index is the number of its row.
    Where ``rows`` is mapped from ``index_file``, a pickled manifest takes the path along and not the rows.
    """

    folder: Path | str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    index_crc32: int
    rows: NDArray[np.void] = field(compare=False, repr=False)
    index_file: Path = field(compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def identity(self) -> str:
        """What tells this data set from others, wherever it lies, in words."""
        return f"{len(self):,} samples, index {self.index_crc32:08x}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _mapped, (self.folder, self.classes, self.shards, self.index_crc32, self.index_file)

    def place(self, shard: int) -> str:
        """Path or URL of shard number ``shard``."""
        return f"{self.folder}/{self.shards[shard].name}"

    @classmethod
    def load(cls, folder: str | Path, key: str = "data.train", *, sizes: bool = True) -> Manifest:
        """Map the index of ``folder``, a path or an fsspec URL, and hold every shard on a local disk against it.

        ``key`` is the setting that named the folder. Raises ConfigError for a missing folder, a missing or invalid
        manifest, an index that is not its own, no samples at all, a missing shard, and a shard of another size. Those
        of a URL are not looked at, nor any without ``sizes``.
        """
        here = _fetched(str(folder), key) if is_url(folder) else Path(folder)
        if not here.is_dir():
            raise ConfigError(key, str(folder), "no such folder", "write shards there with `prelora shards`")
        path = here / MANIFEST_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] == 1:
                raise ConfigError(key, str(path), "a manifest of version 1, without checksums",
                                  f"run `prelora shards index {folder}` once: it reads the shards and replaces it")
            manifest = _parse(folder if is_url(folder) else here, here, content)
        except FileNotFoundError as error:
            name = Path(error.filename).name
            raise ConfigError(key, str(folder), f"holds no {name}",
                              "name a folder made by `prelora shards`, or let `prelora shards index` look through it") \
                from None
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(key, str(path), f"invalid manifest ({type(error).__name__}: {error})", _REWRITE) \
                from error
        if sizes and not is_url(manifest.folder):
            _check_sizes(manifest, key)
        return manifest


def is_url(folder: str | Path) -> bool:
    return isinstance(folder, str) and "://" in folder


def save_manifest(folder: Path, classes: Sequence[str], shards: Sequence[Shard], rows: Sequence[NDArray[np.void]], *,
                  base: str | None = None) -> None:
    """Write ``index.npy`` and then, at once and whole, ``manifest.json`` into ``folder``.

    ``rows`` has those of each shard; their shard numbers are set here. ``base`` is the URL of the shards where
    they do not lie beside the manifest.
    """
    for number, of_shard in enumerate(rows):
        of_shard["shard"] = number
    index, buffer = np.concatenate([np.empty(0, ROW), *rows]), io.BytesIO()
    np.lib.format.write_array(buffer, index, version=(1, 0), allow_pickle=False)
    content = {
        "version": _VERSION, "samples": len(index), "index_crc32": zlib.crc32(buffer.getbuffer()),
        **({} if base is None else {"base": base}),
        "classes": list(classes),
        "shards": [{name: getattr(shard, name) for name in ("name", "size_bytes", "samples", "crc32")}
                   for shard in shards],
    }
    write_whole(folder / INDEX_NAME, buffer.getbuffer())
    write_whole(folder / MANIFEST_NAME, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` to the disk under another name, and then rename: ``path`` is never seen in part."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def file_crc32(path: Path) -> int:
    crc32, buffer = 0, bytearray(1 << 20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            crc32 = zlib.crc32(view[:got], crc32)
    return crc32


def _mapped(folder: Path | str, classes: tuple[str, ...], shards: tuple[Shard, ...], index_crc32: int,
            index_file: Path) -> Manifest:
    # A plain view: a memmap makes an object with a dictionary of its own for every row that is taken out of it.
    rows = np.load(index_file, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    if rows.dtype != ROW or rows.shape != (sum(shard.samples for shard in shards),):
        raise ValueError(f"{index_file} has rows {rows.shape} of {rows.dtype}, which are not this manifest's")
    return Manifest(folder, classes, shards, index_crc32, rows, index_file)


def _parse(folder: Path | str, here: Path, content: dict[str, Any]) -> Manifest:
    """``folder`` is what the user named, ``here`` where the two files are."""
    if content["version"] != _VERSION:
        raise ValueError(f"version {content['version']!r}, and this program reads version {_VERSION}")
    classes, shards, first = tuple(map(str, content["classes"])), [], 0
    for entry in content["shards"]:
        shards.append(Shard(str(entry["name"]), int(entry["size_bytes"]), int(entry["samples"]), int(entry["crc32"]),
                            first))
        first += shards[-1].samples
    index = here / INDEX_NAME
    if (found := file_crc32(index)) != content["index_crc32"]:
        raise ValueError(f"{INDEX_NAME} has the checksum {found:08x} and not {content['index_crc32']:08x}: "
                         "damaged, or of other shards")
    manifest = _mapped(content.get("base", folder), classes, tuple(shards), found, index)
    if len(manifest) == 0:
        raise ValueError("no samples")
    for number, shard in enumerate(shards):
        if Path(shard.name).name != shard.name:
            raise ValueError(f"{shard.name!r} is no file name")
        rows = manifest.rows[shard.first:shard.first + shard.samples]
        if shard.samples < 1:
            raise ValueError(f"{shard.name} is empty")
        stop = rows["offset"] + rows["length"]
        if (rows["shard"] != number).any() or rows["offset"].min() < 0 or stop.max() > shard.size_bytes:
            raise ValueError(f"{shard.name}: a sample lies outside of its {shard.size_bytes} bytes")
        if rows["label"].min() < 0 or rows["label"].max() >= len(classes):
            raise ValueError(f"{shard.name}: a label is of none of the {len(classes)} classes")
        if rows["extension"].max() >= len(EXTENSIONS):
            raise ValueError(f"{shard.name}: an image is in none of the formats {EXTENSIONS}")
    return manifest


def _check_sizes(manifest: Manifest, key: str) -> None:
    for number, shard in enumerate(manifest.shards):
        file = manifest.place(number)
        try:
            size = os.stat(file).st_size
        except FileNotFoundError:
            raise ConfigError(key, file, "the manifest names this shard, and it is missing", _REWRITE) from None
        if size != shard.size_bytes:
            problem = f"the shard has {size} bytes, and {shard.size_bytes} in the manifest"
            raise ConfigError(key, file, problem, _REWRITE)


def _fetched(url: str, key: str) -> Path:
    """A folder of this host with the two files of ``url``; the index is fetched once for each content."""
    import fsspec

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prelora_ds" / "manifests"
    try:
        with fsspec.open(f"{url}/{MANIFEST_NAME}") as file:
            text = file.read()
        here = cache / hashlib.sha256(url.encode() + text).hexdigest()[:32]
        here.mkdir(parents=True, exist_ok=True)
        if not (here / MANIFEST_NAME).exists():
            with fsspec.open(f"{url}/{INDEX_NAME}") as file:
                write_whole(here / INDEX_NAME, file.read())
            write_whole(here / MANIFEST_NAME, text)
    except Exception as error:  # each protocol has its own errors, and a missing package is an ImportError
        raise ConfigError(key, url, f"cannot be read ({type(error).__name__}: {error})",
                          "name a folder with a manifest.json, and install what the protocol needs "
                          "(http: aiohttp, s3: s3fs, gs: gcsfs)") from error
    return here
