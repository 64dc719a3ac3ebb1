"""What lies where in a folder of WebDataset shards.

A tar reader stops without a word at a damaged header, so shards are scanned once, when they are written; from then on
every read goes by the manifest, to an exact place, and a shard that is missing or of another size is an error.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from prelora_ds.core.errors import ConfigError

MANIFEST_NAME = "manifest.json"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
_VERSION = 1
_REWRITE = "write the shards again with `prelora shards`, or copy them again from where they are whole"


class Sample(NamedTuple):
    """One image: ``length`` bytes from ``offset`` of its tar, in the format ``extension``, of class ``label``."""

    offset: int
    length: int
    extension: str
    label: int


@dataclass(frozen=True)
class Shard:
    """A tar file of ``size_bytes`` and the samples in it, in the order of the file."""

    name: str
    size_bytes: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Manifest:
    """A data set: shards in ``folder``, and the class names that the labels 0, 1, ... stand for.

    A sample's index, 0 to ``len(manifest) - 1``, counts through the shards in their order.
    """

    folder: Path
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        return sum(len(shard.samples) for shard in self.shards)

    def save(self) -> None:
        """Write ``manifest.json`` beside the shards."""
        content = {
            "version": _VERSION,
            "classes": self.classes,
            "shards": [
                {"name": shard.name, "size_bytes": shard.size_bytes, "samples": shard.samples} for shard in self.shards
            ],
        }
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        (self.folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, key: str = "data.train") -> Manifest:
        """Read ``folder/manifest.json`` and hold every shard against it.

        ``key`` is the setting that named the folder. Raises ConfigError for a missing folder, a missing or invalid
        manifest, no samples at all, a missing shard, and a shard of another size.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ConfigError(key, str(folder), "no such folder", "write shards there with `prelora shards`")
        path = folder / MANIFEST_NAME
        try:
            manifest = _parse(folder, json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(key, str(folder), f"holds no {MANIFEST_NAME}", "name a folder made by `prelora shards`") \
                from None
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(key, str(path), f"invalid manifest ({type(error).__name__}: {error})", _REWRITE) \
                from error
        for shard in manifest.shards:
            file = folder / shard.name
            if not file.is_file():
                raise ConfigError(key, str(file), "the manifest names this shard, and it is missing", _REWRITE)
            if (size := file.stat().st_size) != shard.size_bytes:
                problem = f"the shard has {size} bytes, and {shard.size_bytes} in the manifest"
                raise ConfigError(key, str(file), problem, _REWRITE)
        return manifest


def _parse(folder: Path, content: dict[str, Any]) -> Manifest:
    if content["version"] != _VERSION:
        raise ValueError(f"version {content['version']!r}, and this program reads version {_VERSION}")
    classes = tuple(map(str, content["classes"]))
    shards = tuple(
        Shard(shard["name"], shard["size_bytes"], tuple(Sample(*row) for row in shard["samples"]))
        for shard in content["shards"]
    )
    for shard in shards:
        if Path(shard.name).name != shard.name:
            raise ValueError(f"{shard.name!r} is no file name")
        for sample in shard.samples:
            if not 0 <= sample.offset < sample.offset + sample.length <= shard.size_bytes:
                raise ValueError(f"{shard.name}: {sample} lies outside of {shard.size_bytes} bytes")
            if not 0 <= sample.label < len(classes):
                raise ValueError(f"{shard.name}: {sample} is of none of the {len(classes)} classes")
    manifest = Manifest(folder, classes, shards)
    if len(manifest) == 0:
        raise ValueError("no samples")
    return manifest


def index_shard(path: str | Path, key: str = "data.train") -> Shard:
    """Scan a tar of samples ``KEY.EXT`` (image) and ``KEY.cls`` (label, decimal); other members are passed over.

    Raises ConfigError for a file that is no whole tar, and for a sample without a label or without exactly one image
    of at least a byte.
    """
    path = Path(path)
    samples = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for name, group in groupby((member for member in tar if member.isfile()), key=lambda m: _split(m.name)[0]):
                members = {_split(member.name)[1]: member for member in group}
                images = [extension for extension in members if extension in IMAGE_EXTENSIONS]
                stream = tar.extractfile(members["cls"]) if "cls" in members else None
                if len(images) != 1 or stream is None:
                    raise ValueError(f"sample {name!r} has {len(images)} images and the members {sorted(members)}; "
                                     "one image and a .cls belong together")
                image = members[images[0]]
                if image.size == 0:
                    raise ValueError(f"sample {name!r} has an image of no bytes")
                samples.append(Sample(image.offset_data, image.size, images[0], int(stream.read())))
            # tarfile takes a damaged header for the end of the archive; the true end is two blocks of zeros.
            file.seek(tar.offset)
            if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                raise ValueError(f"damaged or cut short at byte {tar.offset}")
    except (tarfile.TarError, ValueError, OSError) as error:
        raise ConfigError(key, str(path), f"no readable shard ({error})", _REWRITE) from error
    return Shard(path.name, path.stat().st_size, tuple(samples))


def _split(member: str) -> tuple[str, str]:
    """``folder/KEY.EXT`` -> (``folder/KEY``, ``ext``): as in WebDataset, at the first dot of the file name."""
    path = PurePosixPath(member)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else member, extension.lower()
