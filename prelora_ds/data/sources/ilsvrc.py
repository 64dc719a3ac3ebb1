"""ILSVRC2012 as it is downloaded: a tar of a tar per class for train, a tar of images and the devkit's labels for val.

Labels are those of all published models: the place of a class's WordNet id among the 1000 in alphabetical order. The
devkit numbers the classes in another order (ILSVRC2012_ID); its meta.mat is what translates these.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from prelora_ds.core.errors import ConfigError
from prelora_ds.data.scan import ends_whole
from prelora_ds.data.sources.listing import Listing, Request, broken, choose_split, items

KIND = "ilsvrc2012"
_SPLITS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
_WNID = re.compile(r"n\d{8}")
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_LABELS = ("give --labels: the devkit (ILSVRC2012_devkit_t12.tar.gz, or the folder it unpacks to), or a file with a "
           "line `IMAGE WNID` or `IMAGE LABEL` for each image")

Members = Iterator[tuple[str, int, int]]


def detect(source: Path) -> bool:
    if source.is_dir():
        return any((source / name).is_file() for name in _SPLITS.values())
    return source.is_file() and tarfile.is_tarfile(source)


def find(request: Request) -> Listing:
    """Raises ConfigError for a tar that is damaged, and for val images without a label, or twice."""
    path = request.source
    if path.is_dir():
        found = [split for split, name in _SPLITS.items() if (path / name).is_file()]
        path = path / _SPLITS[choose_split(found, request)]
    with path.open("rb") as file:
        try:
            members = list(_members(file, 0, os.fstat(file.fileno()).st_size))
            if members and all(name.endswith(".tar") for name, _, _ in members):
                return _train(path, file, members)
        except (tarfile.TarError, ValueError) as error:
            raise broken(path, f"no whole tar ({error})") from error
    return _val(path, members, request.labels or _devkit(path.parent))


def _members(file: IO[bytes], start: int, stop: int) -> Members:
    """(name, offset, length) of the files in the tar from ``start`` to ``stop`` of a file.

    Raises ValueError, with the offset, for a tar that goes on beyond, or has no end.
    """
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.offset_data + member.size > stop:
                raise ValueError(f"cut short at byte {stop}")
            if member.isfile():
                yield Path(member.name).name, member.offset_data, member.size
        if not ends_whole(file, tar.offset):
            raise ValueError(f"damaged or cut short at byte {tar.offset}")


def _train(path: Path, file: IO[bytes], tars: list[tuple[str, int, int]]) -> Listing:
    wnids = sorted(name.removesuffix(".tar") for name, _, _ in tars)
    if len(set(wnids)) < len(wnids):
        raise ValueError("a class comes twice")
    offsets, lengths, labels = [], [], []
    for name, start, size in sorted(tars):
        seen = set()
        try:
            for image, offset, length in sorted(_members(file, start, start + size)):
                if image in seen:
                    raise ValueError(f"{image} comes twice")
                seen.add(image)
                offsets.append(offset)
                lengths.append(length)
                labels.append(wnids.index(name.removesuffix(".tar")))
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
        if not seen:
            raise ValueError(f"{name}: no images")
    return Listing(KIND, tuple(wnids), (str(path),), items(0, labels, offsets, lengths))


def _val(path: Path, members: list[tuple[str, int, int]], source: Path | None) -> Listing:
    members = sorted(members)
    names = [Path(name).stem for name, _, _ in members]
    if not names:
        raise broken(path, "holds no images")
    if twice := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set():
        raise broken(path, f"{min(twice)} comes twice")
    if source is None:
        raise ConfigError("--labels", None, f"{path} has no labels in it", _LABELS)
    classes, labels = _labels(source, names)
    missing = [name for name in names if name not in labels]
    if missing:
        raise ConfigError("--labels", str(source), f"{len(missing)} images have no label, the first is {missing[0]}",
                          _LABELS)
    return Listing(KIND, classes, (str(path),), items(0, [labels[name] for name in names],
                                                      [offset for _, offset, _ in members],
                                                      [length for _, _, length in members]))


def _labels(source: Path, names: list[str]) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    """(classes, image -> label); classes is None for a file of numbers."""
    kit = _read_devkit(source)
    if kit is not None:
        classes, truth = kit
        if len(truth) != len(names):
            raise ConfigError("--labels", str(source), f"{len(truth)} labels for {len(names)} images", _LABELS)
        return classes, dict(zip(names, truth, strict=True))
    labels: dict[str, str] = {}
    for number, line in enumerate(source.read_text().splitlines(), 1):
        fields = re.split(r"[,\s]+", line.strip())
        if fields[0] in ("", "ImageId"):
            continue
        name = Path(fields[0]).stem
        if len(fields) < 2 or name in labels:
            problem = f"line {number}, {line!r}: " + ("the image comes twice" if name in labels else "no label")
            raise ConfigError("--labels", str(source), problem, _LABELS)
        labels[name] = fields[1]
    if all(_WNID.fullmatch(label) for label in labels.values()):
        wnids = tuple(sorted(set(labels.values())))
        return wnids, {name: wnids.index(label) for name, label in labels.items()}
    try:
        return None, {name: int(label) for name, label in labels.items()}
    except ValueError as error:
        raise ConfigError("--labels", str(source), f"neither WordNet ids nor numbers ({error})", _LABELS) from error


def _devkit(folder: Path) -> Path | None:
    return next((path for name in ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")
                 if (path := folder / name).exists()), None)


def _read_devkit(source: Path) -> tuple[tuple[str, ...], list[int]] | None:
    """(WordNet ids, label of each val image in the order of names), or None where ``source`` is no devkit."""
    if source.name == _TRUTH:
        source = source.parent
    if source.is_dir():
        found = {name: next(source.rglob(name), None) for name in (_TRUTH, _META)}
        files = {name: path.read_bytes() for name, path in found.items() if path is not None}
    elif tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            files = {Path(member.name).name: stream.read() for member in tar
                     if Path(member.name).name in (_TRUTH, _META) and (stream := tar.extractfile(member))}
    else:
        return None
    if files.keys() != {_TRUTH, _META}:
        raise ConfigError("--labels", str(source), f"no devkit: it lacks {_TRUTH} or {_META}, and the numbers of the "
                          "first mean nothing without the second", _LABELS)
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(files[_META]), squeeze_me=True)["synsets"]
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    wnids = tuple(sorted(wnid_of.values()))
    try:
        return wnids, [wnids.index(wnid_of[int(line)]) for line in files[_TRUTH].split()]
    except (KeyError, ValueError) as error:
        raise ConfigError("--labels", str(source), f"a class that {_META} has not ({error})", _LABELS) from error
