"""Reading one shard from end to end.

This is the only reader that trusts nothing, and every manifest comes from it.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prelora_ds.data.labels import LabelReader, SampleError
from prelora_ds.data.manifest import EXTENSIONS, Shard, file_crc32, is_url
from prelora_ds.data.rows import ROW
from prelora_ds.errors import ConfigError, file_error

_PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
_LABELS = ("cls", "json")
_JPEGS = {"jfif", "jpe", "pjpeg", "pjp"}  # other extensions of JPEG files
_OTHER_IMAGES = _JPEGS | {"gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "avif", "heic"}
_END = bytes(2 * tarfile.BLOCKSIZE)
_REWRITE = "write the shards again, or copy them again from an intact source"
_LARGEST = 1 << 30  # bytes; larger members are not read
_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset skips
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class ScannedShard(NamedTuple):
    """A shard and its rows.

    pickled: the number of pickled members of its samples, which are never decoded.
    skipped: the names of the members that belong to no sample.
    """

    shard: Shard
    rows: NDArray[np.void]
    pickled: int
    skipped: tuple[str, ...] = ()


class _Member(NamedTuple):
    key: str
    extension: str
    info: tarfile.TarInfo


def index_shard(
    path: str | Path,
    key: str = "data.train",
    *,
    label_key: str | None = None,
    classes: Sequence[str] | None = None,
) -> ScannedShard:
    """Scan a tar of samples: ``KEY.EXT`` (image), ``KEY.cls`` or ``KEY.json`` (see `LabelReader`).

    Other members of a sample are skipped, and so are members that belong to no sample: those that
    webdataset skips (hidden files, names without an extension, ``__meta__``), and groups with
    neither an image nor a label.

    Raises ConfigError, with the offset, for

    - a file that is not a complete tar, and a shard without samples;
    - a key or a member that occurs twice;
    - a sample with a dot in its name, because WebDataset ends the name at the first dot;
    - a sample without a label, or without exactly one image of at least one byte;
    - an image or a label that is not stored in the tar in one piece (links, sparse members).

    Raises DiskError if the disk fails.
    """
    path = Path(path)
    labels = LabelReader(label_key, classes)
    rows: list[tuple[int, int, int, int, int, int]] = []
    seen: set[str] = set()
    skipped: list[str] = []
    pickled = 0
    try:
        if path.exists() and not path.is_file():
            raise SampleError("is not a file", "name shards that are plain tar files")
        with path.open("rb") as file:
            _refuse_packed(file)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for name, group in groupby(_members(tar, skipped), key=lambda member: member.key):
                    group_members = list(group)
                    members = {member.extension: member.info for member in group_members}
                    _refuse_dotted(group_members)
                    if not members.keys() & {*EXTENSIONS, *_LABELS}:
                        skipped += [member.info.name for member in group_members]
                        continue
                    where = f"at byte {group_members[0].info.offset}, sample {name!r}"
                    if name in seen or len(members) < len(group_members):
                        raise SampleError(f"{where}: duplicate sample name", _REWRITE)
                    seen.add(name)
                    rows.append(_row(file, where, members, labels))
                    pickled += sum(
                        extension.rpartition(".")[2] in _PICKLES for extension in members
                    )
                _check_end(file, tar.offset)
        if not rows:
            raise SampleError(
                "at byte 0: the shard is empty, it has no sample" + _skipped_text(skipped), _REWRITE
            )
        shard = Shard(path.name, path.stat().st_size, len(rows), file_crc32(path), first=0)
    except SampleError as error:
        raise ConfigError(key, str(path), str(error), error.remedy) from error
    except OSError as error:
        raise file_error(
            key, path, error, "cannot be read", "name shards that this user may read"
        ) from error
    # Besides its own errors, tarfile raises these for damaged numbers and long chains of headers.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise ConfigError(
            key, str(path), f"this shard cannot be read ({error})", _REWRITE
        ) from error
    return ScannedShard(shard, np.array(rows, ROW), pickled, tuple(skipped))


def _members(tar: tarfile.TarFile, skipped: list[str]) -> Iterator[_Member]:
    """Yield the members of samples; append all other names, except folders, to ``skipped``."""
    for info in tar:
        if (parts := split(info.name)) is not None and not info.isdir():
            yield _Member(*parts, info)
        elif not info.isdir():
            skipped.append(info.name)


def _refuse_dotted(group: list[_Member]) -> None:
    """Raise SampleError if a group contains an image and its label after a further dot."""
    names = {member.extension: member.info.name for member in group}
    labels = ("cls",) if names.keys() & {*EXTENSIONS, *_LABELS} else _LABELS
    for extension, name in names.items():
        start, dot, last = extension.rpartition(".")
        image = dot and (last in EXTENSIONS or last in _OTHER_IMAGES)
        if image and any(f"{start}.{label}" in names for label in labels):
            raise SampleError(
                f"at byte {group[0].info.offset}, {name!r} has a dot in its name: WebDataset reads "
                f"it as the member {extension!r} of the sample {group[0].key!r}",
                "write the shards again, with names without a dot before the extension",
            )


def _row(
    file: IO[bytes], where: str, members: dict[str, tarfile.TarInfo], labels: LabelReader
) -> tuple[int, int, int, int, int, int]:
    """Return the row of a sample; ``members`` maps extensions to members. Raises SampleError."""
    images = [extension for extension in members if extension in EXTENSIONS]
    if not images and (others := sorted(members.keys() & _OTHER_IMAGES)):
        raise SampleError(
            f"{where} has its image in .{others[0]}, and only {', '.join(EXTENSIONS)} are read",
            "rename the member to .jpg"
            if others[0] in _JPEGS
            else "write the shards again, with this image as PNG or JPEG",
        )
    if len(images) != 1:
        raise SampleError(
            f"{where} has {len(images)} images ({', '.join(EXTENSIONS)}) among its members "
            f"{sorted(members)}",
            "give each sample exactly one image and one label, one after the other in the tar "
            "(`tar --sort=name` orders them this way)",
        )
    image = members[images[0]]
    try:
        label_extension = labels.member(list(members))
    except SampleError as error:
        raise SampleError(f"{where} {error}", error.remedy) from error
    for member in (image, members[label_extension]):
        _refuse_scattered(member, where)
    if image.size == 0:
        raise SampleError(f"{where} has an empty image", _REWRITE)
    try:
        label = labels.read(label_extension, _read(file, members[label_extension]))
    except SampleError as error:
        raise SampleError(f"{where} {error}", error.remedy) from error
    return (
        image.offset_data,
        image.size,
        zlib.crc32(_read(file, image)),
        label,
        0,
        EXTENSIONS.index(images[0]),
    )


def _refuse_scattered(member: tarfile.TarInfo, where: str) -> None:
    """Raise SampleError if ``member`` is not stored at its offset in the tar, in one piece."""
    if member.issparse():
        raise SampleError(
            f"{where}: {member.name!r} is stored with holes (sparse), and not in one piece",
            "write the shard again without tar's option --sparse (-S)",
        )
    if not member.isreg():
        kind = "not a file"
        if member.islnk():
            kind = "a hard link"
        elif member.issym():
            kind = "a symbolic link"
        raise SampleError(
            f"{where}: {member.name!r} is {kind}, and has no bytes of its own in the shard",
            "write the shard again with tar's options --dereference --hard-dereference",
        )


def _refuse_packed(file: IO[bytes]) -> None:
    start = os.pread(file.fileno(), max(map(len, _PACKED)), 0)
    for magic, name in _PACKED.items():
        if start.startswith(magic):
            raise SampleError(
                f"is compressed with {name}; its samples cannot be addressed",
                "unpack the shard, and index the plain tar",
            )


def _check_end(file: IO[bytes], offset: int) -> None:
    """Raise SampleError unless the tar ends at ``offset``, and only zeros follow."""
    # tarfile treats a damaged header as the end of the archive; the true end is two zero blocks.
    if not ends_whole(file, offset):
        raise SampleError(f"damaged or cut short at byte {offset}", _REWRITE)
    position = offset
    while part := os.pread(file.fileno(), 1 << 20, position):
        if part.strip(b"\0"):
            raise SampleError(
                f"data follows the end of the archive (byte {offset}), which tar readers ignore",
                "join tars with `tar --concatenate` and not with cat, or write the shard again",
            )
        position += len(part)


def ends_whole(file: IO[bytes], offset: int) -> bool:
    """Return whether the end-of-archive blocks of the tar in ``file`` are at ``offset``."""
    return os.pread(file.fileno(), len(_END), offset) == _END


def split(member: str) -> tuple[str, str] | None:
    """Split ``folder/KEY.EXT`` at the first dot of the file name: (``folder/KEY``, ``ext``).

    Returns None for members that belong to no sample: hidden ones, ``__meta__``, and names without
    an extension. WebDataset has the same rules.
    """
    path = PurePosixPath(member)
    stem, _, extension = path.name.partition(".")
    if not stem or not extension or _META.match(member):
        return None
    return str(path.with_name(stem)), extension.lower()


def _read(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    if member.offset_data + member.size > os.fstat(file.fileno()).st_size:
        raise SampleError(f"at byte {member.offset_data}: {member.name!r} is cut short", _REWRITE)
    if member.size > _LARGEST:
        raise SampleError(
            f"at byte {member.offset_data}: {member.name!r} has {member.size} bytes, "
            f"and at most {_LARGEST} are read",
            _REWRITE,
        )
    return os.pread(file.fileno(), member.size, member.offset_data)


def _skipped_text(skipped: list[str]) -> str:
    if not skipped:
        return ""
    return f" ({len(skipped)} members belong to no sample; the first is {skipped[0]!r})"


@contextmanager
def local_shard(location: str) -> Iterator[Path]:
    """A context with the path of the shard on this host; a remote shard is fetched for its time."""
    if not is_url(location):
        yield Path(location)
        return
    import fsspec

    with tempfile.TemporaryDirectory(prefix="prelora-") as folder:
        path = Path(folder) / location.rpartition("/")[2]
        try:
            with fsspec.open(location, "rb") as remote, path.open("wb") as file:
                shutil.copyfileobj(remote, file, 1 << 20)
        except Exception as error:  # each protocol has its own errors
            raise OSError(f"{location}: {type(error).__name__}: {error}") from error
        yield path
