"""ILSVRC2012 as it is downloaded.

Train is a tar with one tar per class; val is a tar or a folder of images, with labels elsewhere.
The labels are those of all published models: the index of a class's WordNet id among the 1000 ids
in alphabetical order.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

from prelora_ds.data.shards.reading import broken, reading
from prelora_ds.data.shards.scan import ends_whole
from prelora_ds.data.shards.sources.devkit import HOW_TO_GIVE_LABELS, labels_next_to, read_labels
from prelora_ds.data.shards.sources.listing import (
    Listing,
    Request,
    choose_split,
    hidden,
    is_image,
    items,
)
from prelora_ds.errors import ConfigError

FORMAT = "ilsvrc2012"
_SPLITS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.jpe?g", re.IGNORECASE)
_PACKED_TAR = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$")
_LEVELS = 4  # Kaggle has LOC_val_solution.csv this far above ILSVRC/Data/CLS-LOC/val


class _Member(NamedTuple):
    name: str
    offset: int
    length: int


def detect(source: Path) -> Path | None:
    if source.is_dir():
        tars = (source / name for name in _SPLITS.values())
        images = (Path(entry) for entry in os.scandir(source) if _VAL_IMAGE.fullmatch(entry.name))
        return next((tar for tar in tars if tar.is_file()), None) or next(images, None)
    return source if source.is_file() and tarfile.is_tarfile(source) else None


def find(request: Request) -> Listing:
    """List the images of a tar or a flat folder.

    Raises ConfigError for a damaged tar, and for val images that have no label or occur twice.
    """
    path = request.source
    tars = []
    if path.is_dir():
        tars = [split for split, name in _SPLITS.items() if (path / name).is_file()]
    if path.is_dir() and not tars:
        return _flat(request)
    if tars:
        path = path / _SPLITS[choose_split(tars, request)]
    skipped = Counter[str]()
    with reading(path, "a whole tar"), path.open("rb") as file:
        members = list(_members(file, 0, os.fstat(file.fileno()).st_size, skipped))
        if packed := next(
            (member.name for member in members if _PACKED_TAR.search(member.name)), None
        ):
            raise broken(
                path,
                f"its member {packed} is packed, and images are read in place in the tar",
                "unpack its members, and write them to a new tar",
            )
        inner = [member for member in members if member.name.endswith(".tar")]
        if not tars:
            choose_split(["train" if inner else "val"], request)
        if inner:
            if request.labels is not None:
                raise ConfigError(
                    "--labels",
                    str(request.labels),
                    f"{path} contains the labels of its images",
                    "omit --labels",
                )
            skipped["members that are not a tar"] += len(members) - len(inner)
            return _train(path, file, inner, skipped)
    classes, labels = _val_labels(
        path, [member.name for member in members], request.labels or labels_next_to(path.parent)
    )
    members.sort()
    return Listing(
        FORMAT,
        classes,
        (str(path),),
        items(
            0,
            [labels[Path(member.name).stem] for member in members],
            [member.offset for member in members],
            [member.length for member in members],
        ),
        _counts_text(skipped),
    )


def name(file: str, offset: int, length: int) -> str:
    """Return the name of the image at ``offset`` of a tar, from the tar's header.

    A ``length`` of -1 means that the image is the file itself.
    """
    if length < 0:
        return file
    try:
        with open(file, "rb") as tar:
            header = os.pread(tar.fileno(), tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        return f"{file}, member {member} at byte {offset}"
    except (OSError, tarfile.TarError):
        return f"{file}, at byte {offset}"


def _members(file: IO[bytes], start: int, stop: int, skipped: Counter[str]) -> Iterator[_Member]:
    """Yield the files in the tar between ``start`` and ``stop`` of ``file``.

    Members that are skipped are counted in ``skipped``. Raises ValueError, with the offset, for a
    tar that continues beyond ``stop``, has no end, or has a sparse member.
    """
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.issparse():
                raise ValueError(
                    f"{member.name} at byte {member.offset} is stored with holes (sparse); "
                    "write the tar again without tar's option -S"
                )
            if member.size < 0 or member.offset_data + member.size > stop:
                raise ValueError(f"cut short at byte {stop}, or damaged at byte {member.offset}")
            name = Path(member.name).name
            if hidden(name) and not member.isdir():
                skipped["hidden members"] += 1
            elif member.isfile():
                yield _Member(name, member.offset_data, member.size)
            elif not member.isdir():
                skipped["links or devices"] += 1
        if not ends_whole(file, tar.offset):
            raise ValueError(f"damaged or cut short at byte {tar.offset}")


def _train(path: Path, file: IO[bytes], tars: list[_Member], skipped: Counter[str]) -> Listing:
    wnids = sorted(tar.name.removesuffix(".tar") for tar in tars)
    if len(set(wnids)) < len(wnids):
        raise ValueError("a class occurs twice")
    number = {wnid: label for label, wnid in enumerate(wnids)}
    offsets, lengths, labels = [], [], []
    for tar in sorted(tars):
        seen = set()
        try:
            for image in sorted(_members(file, tar.offset, tar.offset + tar.length, skipped)):
                if image.name in seen:
                    raise ValueError(f"{image.name} occurs twice")
                seen.add(image.name)
                offsets.append(image.offset)
                lengths.append(image.length)
                labels.append(number[tar.name.removesuffix(".tar")])
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"{tar.name}: {error}") from error
        if not seen:
            raise ValueError(f"{tar.name}: no images")
    return Listing(
        FORMAT,
        tuple(wnids),
        (str(path),),
        items(0, labels, offsets, lengths),
        _counts_text(skipped),
    )


def _flat(request: Request) -> Listing:
    """List a flat folder of val images, such as Kaggle's.

    Without --labels, the table of labels is next to the images or in a folder above.
    """
    folder, skipped = request.source, Counter[str]()
    if request.split == "val" and (folder / "val").is_dir():
        folder = folder / "val"
    names = []
    for entry in os.scandir(folder):
        if hidden(entry.name):
            skipped["hidden files"] += 1
        elif entry.is_dir():
            skipped["folders"] += 1
        elif is_image(entry.name):
            names.append(entry.name)
        else:
            skipped["other files"] += 1
    if not names:
        if request.labels is not None:
            raise ConfigError(
                "--labels",
                str(request.labels),
                f"applies to a flat folder or a tar of images, and {folder} contains neither images "
                f"nor {' or '.join(_SPLITS.values())}",
                "omit it",
            )
        choose_split([], request)
    choose_split(["val"], request)
    names.sort()
    classes, labels = _val_labels(
        folder, names, request.labels or labels_next_to(folder.absolute(), _LEVELS)
    )
    return Listing(
        FORMAT,
        classes,
        tuple(str(folder / name) for name in names),
        items(range(len(names)), [labels[Path(name).stem] for name in names], 0, -1),
        _counts_text(skipped),
    )


def _val_labels(
    path: Path, names: list[str], source: Path | None
) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    """Return (classes or None, label of each image by its name without suffix)."""
    stems = sorted(Path(name).stem for name in names)
    if not stems:
        raise broken(path, "contains no images")
    if twice := next((stem for stem, after in pairwise(stems) if stem == after), None):
        raise broken(path, f"{twice} occurs twice")
    if source is None:
        raise ConfigError(
            "--labels",
            None,
            f"{path} contains no labels, and there are none next to it",
            HOW_TO_GIVE_LABELS,
        )
    classes, labels = read_labels(source, stems)
    if missing := [stem for stem in stems if stem not in labels]:
        raise ConfigError(
            "--labels",
            str(source),
            f"{len(missing)} images have no label, the first is {missing[0]}",
            HOW_TO_GIVE_LABELS,
        )
    return classes, labels


def _counts_text(skipped: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(skipped.items()) if count)
