"""Reading one shard from end to end: the only place that trusts nothing, and the source of every manifest."""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prelora_ds.core.errors import ConfigError
from prelora_ds.data.manifest import EXTENSIONS, ROW, Shard, file_crc32

_PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
_END = bytes(2 * tarfile.BLOCKSIZE)
_MEND = "write the shards again, or copy them again from where they are whole"


class ScannedShard(NamedTuple):
    """A shard, its rows, and how many pickled members were passed over: nothing here ever decodes one."""

    shard: Shard
    rows: NDArray[np.void]
    pickled: int


def index_shard(path: str | Path, key: str = "data.train", *, label_key: str = "label",
                classes: Sequence[str] | None = None) -> ScannedShard:
    """Scan a tar of samples: ``KEY.EXT`` (image), ``KEY.cls`` (label, decimal) or ``KEY.json`` (under ``label_key``).

    A label in JSON may be a name out of ``classes``. Other members are passed over. Raises ConfigError, with the
    offset, for a file that is no whole tar, for a shard without samples, for a key or a member that comes twice, and
    for a sample without a label or without exactly one image of at least a byte.
    """
    path, numbers = Path(path), {name: label for label, name in enumerate(classes or ())}
    rows: list[tuple[int, int, int, int, int, int]] = []
    seen: set[str] = set()
    pickled = 0
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for name, group in groupby((member for member in tar if member.isfile()), key=lambda m: split(m.name)[0]):
                found = list(group)
                members = {split(member.name)[1]: member for member in found}
                where = f"at byte {found[0].offset}, sample {name!r}"
                if name in seen or len(members) < len(found):
                    raise ValueError(f"{where}: the name comes twice in this shard")
                seen.add(name)
                images = [extension for extension in members if extension in EXTENSIONS]
                if len(images) != 1 or not members.keys() & {"cls", "json"}:
                    raise ValueError(f"{where} has {len(images)} images and the members {sorted(members)}; one image "
                                     "and a .cls or .json with its label belong together")
                image = members[images[0]]
                if image.size == 0:
                    raise ValueError(f"{where} has an image of no bytes")
                try:
                    label = _label({extension: _read(file, members[extension]) for extension in ("cls", "json")
                                    if extension in members}, label_key, numbers)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{where} has no label ({type(error).__name__}: {error})") from error
                if label < 0 or (classes is not None and label >= len(classes)):
                    of = "" if classes is None else f" of the {len(classes)}"
                    raise ValueError(f"{where} has the label {label}, which is none{of} of the classes")
                pickled += sum(extension.rpartition(".")[2] in _PICKLES for extension in members)
                rows.append((image.offset_data, image.size, zlib.crc32(_read(file, image)), label, 0,
                             EXTENSIONS.index(images[0])))
            # tarfile takes a damaged header for the end of the archive; the true end is two blocks of zeros.
            if not ends_whole(file, tar.offset):
                raise ValueError(f"damaged or cut short at byte {tar.offset}")
        if not rows:
            raise ValueError("at byte 0: the shard is empty, it has no sample")
    except (tarfile.TarError, ValueError, OSError) as error:
        raise ConfigError(key, str(path), f"no readable shard ({error})", _MEND) from error
    shard = Shard(path.name, path.stat().st_size, len(rows), file_crc32(path), first=0)
    return ScannedShard(shard, np.array(rows, ROW), pickled)


def ends_whole(file: IO[bytes], offset: int) -> bool:
    """Whether the tar in ``file`` that was read up to ``offset`` has its end there."""
    return os.pread(file.fileno(), len(_END), offset) == _END


def split(member: str) -> tuple[str, str]:
    """``folder/KEY.EXT`` -> (``folder/KEY``, ``ext``): as in WebDataset, at the first dot of the file name."""
    path = PurePosixPath(member)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else member, extension.lower()


def _read(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    data = os.pread(file.fileno(), member.size, member.offset_data)
    if len(data) != member.size:
        raise ValueError(f"at byte {member.offset_data}: {member.name!r} is cut short")
    return data


def _label(members: dict[str, bytes], label_key: str, numbers: dict[str, int]) -> int:
    if "cls" in members:
        return int(members["cls"])
    label = json.loads(members["json"])[label_key]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise TypeError(f"{label_key!r} is {label!r}, neither a number nor a name")
    return label if isinstance(label, int) else numbers[label] if label in numbers else int(label)
