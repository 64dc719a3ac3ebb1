"""Reading one shard from end to end: the only place that trusts nothing, and the source of every manifest."""

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
_JPEGS = {"jfif", "jpe", "pjpeg", "pjp"}  # other names of the format
_OTHER_IMAGES = _JPEGS | {"gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "avif", "heic"}
_END = bytes(2 * tarfile.BLOCKSIZE)
_MEND = "write the shards again, or copy them again from where they are whole"
_LARGEST = 1 << 30  # bytes of a member that is read
_META = re.compile(r"__[^/]*__($|/)")  # what webdataset passes over
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class ScannedShard(NamedTuple):
    """A shard and its rows.

    pickled: how many pickled members its samples have; nothing here ever decodes one.
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

    Other members of a sample are passed over. So are members that belong to none: those that
    webdataset passes over (hidden files, names without an extension, ``__meta__``), and groups
    without an image and a label.

    Raises ConfigError, with the offset, for

    - a file that is not a whole tar, and a shard without samples;
    - a key or a member that comes twice;
    - a sample whose name has a dot in it, for WebDataset takes the name to end there;
    - a sample without a label, or without exactly one image of at least a byte;
    - an image or a label whose bytes do not lie in the tar in one piece (links, sparse members).

    Raises DiskError where the disk fails.
    """
    path, labels = Path(path), LabelReader(label_key, classes)
    rows: list[tuple[int, int, int, int, int, int]] = []
    seen: set[str] = set()
    passed: list[str] = []
    pickled = 0
    try:
        if path.exists() and not path.is_file():
            raise SampleError("is not a file", "name shards that are plain tar files")
        with path.open("rb") as file:
            _refuse_packed(file)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for name, group in groupby(_members(tar, passed), key=lambda member: member.key):
                    found = list(group)
                    members = {member.extension: member.info for member in found}
                    _refuse_dotted(found)
                    if not members.keys() & {*EXTENSIONS, *_LABELS}:
                        passed += [member.info.name for member in found]
                        continue
                    where = f"at byte {found[0].info.offset}, sample {name!r}"
                    if name in seen or len(members) < len(found):
                        raise SampleError(f"{where}: the name comes twice in this shard", _MEND)
                    seen.add(name)
                    rows.append(_row(file, where, members, labels))
                    pickled += sum(
                        extension.rpartition(".")[2] in _PICKLES for extension in members
                    )
                _check_end(file, tar.offset)
        if not rows:
            raise SampleError(
                "at byte 0: the shard is empty, it has no sample" + _and(passed), _MEND
            )
        shard = Shard(path.name, path.stat().st_size, len(rows), file_crc32(path), first=0)
    except SampleError as error:
        raise ConfigError(key, str(path), str(error), error.remedy) from error
    except OSError as error:
        raise file_error(
            key, path, error, "cannot be read", "name shards that this user may read"
        ) from error
    # Besides its own errors, tarfile lets through what a damaged number or a long chain of headers
    # leads to.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise ConfigError(key, str(path), f"this shard cannot be read ({error})", _MEND) from error
    return ScannedShard(shard, np.array(rows, ROW), pickled, tuple(passed))


def _members(tar: tarfile.TarFile, passed: list[str]) -> Iterator[_Member]:
    """The members of samples; the names of all others, except folders, are added to ``passed``."""
    for info in tar:
        if (parts := split(info.name)) is not None and not info.isdir():
            yield _Member(*parts, info)
        elif not info.isdir():
            passed.append(info.name)


def _refuse_dotted(group: list[_Member]) -> None:
    """Raise where the members of a group are an image and its label after a further dot."""
    names = {member.extension: member.info.name for member in group}
    labels = ("cls",) if names.keys() & {*EXTENSIONS, *_LABELS} else _LABELS
    for extension, name in names.items():
        start, dot, last = extension.rpartition(".")
        image = dot and (last in EXTENSIONS or last in _OTHER_IMAGES)
        if image and any(f"{start}.{label}" in names for label in labels):
            raise SampleError(
                f"at byte {group[0].info.offset}, {name!r} has a dot in its name: WebDataset takes "
                f"it for the member {extension!r} of the sample {group[0].key!r}",
                "write the shards again, with names that have no dot before the extension",
            )


def _row(
    file: IO[bytes], where: str, members: dict[str, tarfile.TarInfo], labels: LabelReader
) -> tuple[int, int, int, int, int, int]:
    """The row of a sample, given the members by their extensions. Raises SampleError."""
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
            "give each sample one image and one label, one after "
            "the other in the tar (`tar --sort=name` puts them so)",
        )
    image = members[images[0]]
    try:
        of_label = labels.member(list(members))
    except SampleError as error:
        raise SampleError(f"{where} {error}", error.remedy) from error
    for member in (image, members[of_label]):
        _refuse_scattered(member, where)
    if image.size == 0:
        raise SampleError(f"{where} has an image of no bytes", _MEND)
    try:
        label = labels.read(of_label, _read(file, members[of_label]))
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
    """Raise where the bytes of ``member`` are not those at its place in the tar."""
    if member.issparse():
        raise SampleError(
            f"{where}: {member.name!r} is stored with holes (sparse), and its bytes do not lie in "
            "one piece",
            "write the shard again without tar's option --sparse (-S)",
        )
    if not member.isreg():
        kind = (
            "a hard link"
            if member.islnk()
            else "a symbolic link"
            if member.issym()
            else "not a file"
        )
        raise SampleError(
            f"{where}: {member.name!r} is {kind}, and has no bytes of its own in the shard",
            "write the shard again with tar's options --dereference --hard-dereference",
        )


def _refuse_packed(file: IO[bytes]) -> None:
    begin = os.pread(file.fileno(), max(map(len, _PACKED)), 0)
    for magic, name in _PACKED.items():
        if begin.startswith(magic):
            raise SampleError(
                f"is compressed with {name}: samples have no place of their own in it",
                "unpack the shard, and index the plain tar",
            )


def _check_end(file: IO[bytes], offset: int) -> None:
    """Raise unless the tar that was read up to ``offset`` ends there, and only zeros follow."""
    # tarfile takes a damaged header for the end of the archive; the true end is two blocks of zeros
    if not ends_whole(file, offset):
        raise SampleError(f"damaged or cut short at byte {offset}", _MEND)
    place = offset
    while part := os.pread(file.fileno(), 1 << 20, place):
        if part.strip(b"\0"):
            raise SampleError(
                f"something follows the end of the archive (byte {offset}) that a tar "
                "reader does not see",
                "join tars with `tar --concatenate` and not with cat, or write the shard again",
            )
        place += len(part)


def ends_whole(file: IO[bytes], offset: int) -> bool:
    """Whether the tar in ``file`` that was read up to ``offset`` has its end there."""
    return os.pread(file.fileno(), len(_END), offset) == _END


def split(member: str) -> tuple[str, str] | None:
    """``folder/KEY.EXT`` -> (``folder/KEY``, ``ext``), at the first dot of the file name.

    None for what belongs to no sample: hidden members, ``__meta__``, names without an extension.
    All this is as in WebDataset.
    """
    path = PurePosixPath(member)
    stem, _, extension = path.name.partition(".")
    if not stem or not extension or _META.match(member):
        return None
    return str(path.with_name(stem)), extension.lower()


def _read(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    if member.offset_data + member.size > os.fstat(file.fileno()).st_size:
        raise SampleError(f"at byte {member.offset_data}: {member.name!r} is cut short", _MEND)
    if member.size > _LARGEST:
        raise SampleError(
            f"at byte {member.offset_data}: {member.name!r} has {member.size} bytes, "
            f"and more than {_LARGEST} are not read",
            _MEND,
        )
    return os.pread(file.fileno(), member.size, member.offset_data)


def _and(passed: list[str]) -> str:
    return f" ({len(passed)} members belong to none; the first is {passed[0]!r})" if passed else ""


@contextmanager
def local_shard(place: str) -> Iterator[Path]:
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
