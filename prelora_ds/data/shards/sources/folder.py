"""A tree as for torchvision's ImageFolder: one folder per class, with images anywhere below."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from prelora_ds.data.shards.reading import broken, reading
from prelora_ds.data.shards.sources import ilsvrc
from prelora_ds.data.shards.sources.listing import (
    IMAGES,
    SPLITS,
    Listing,
    Request,
    choose_split,
    hidden,
    is_image,
    items,
    some,
)
from prelora_ds.data.shards.sources.split_folders import (
    folders_in,
    has_images,
    split_folders,
    splits_below,
)
from prelora_ds.errors import ConfigError

FORMAT = "imagefolder"


def detect(source: Path) -> Path | None:
    return next((source / name for name in folders_in(source)), None) if source.is_dir() else None


def first_image(source: Path) -> Path | None:
    """Return an image in a folder below ``source``, if there is one."""
    for path, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not hidden(name))
        for name in sorted(files) if Path(path) != source else ():
            if is_image(name) and not hidden(name):
                return Path(path, name)
    return None


def find(request: Request) -> Listing:
    """List the images of a tree; labels are the indices of the folders in alphabetical order.

    Folders that belong to a system or a program are skipped. Raises ConfigError for a class without
    images, for folders of splits next to others, and for links that lead to a folder above or twice
    to the same file.
    """
    top = request.source
    tree = _Tree()
    names = folders_in(top)
    if splits := split_folders(top, names, request):
        top = top / choose_split(splits, request)
        tree.other_folders += [name for name in names if name not in splits]
        names = folders_in(top)
        if not names and ilsvrc.detect(top):
            return ilsvrc.find(Request(top, labels=request.labels))
    elif request.split is not None:
        raise ConfigError(
            "--split",
            request.split,
            f"{top} is not divided into {', '.join(sorted(SPLITS))}",
            "omit it, and name the folder of the split",
        )
    images = {name: tree.images(top, name) for name in names}
    if len(names) == 1:
        _refuse_wrapped(top, names[0])
    _refuse_ambiguous(top, images)
    for folder in {request.source, top}:
        tree.count_stray(folder)
    if not names:
        raise broken(
            top,
            f"no folder with a sub-folder per class ({tree.skipped() or 'it is empty'})",
            "name a folder with a sub-folder per class; a flat folder needs --labels",
        )
    if empty := [name for name in names if not images[name]]:
        contents = ""
        remedy = "remove the empty folders, or put the images there"
        if others := _others([top / name for name in empty]):
            contents = f"; there are: {others}"
            remedy = (
                f"save images in a format that is read ({', '.join(sorted(IMAGES))}); remove "
                "folders without images"
            )
        if len(empty) == 1:
            raise broken(top / empty[0], f"this class has no images{contents}", remedy)
        problem = f"{len(empty)} of {len(names)} classes have no images: {some(empty)}{contents}"
        raise broken(top, problem, remedy)
    tree.check_links(images)
    files = [file for name in names for file in images[name]]
    labels = [label for label, name in enumerate(names) for _ in images[name]]
    return Listing(
        FORMAT,
        tuple(names),
        tuple(files),
        items(range(len(files)), labels, 0, -1),
        tree.skipped(),
    )


def _others(folders: list[Path]) -> str:
    """Return a text that counts the files in these folders that are not images, by suffix."""
    counts = Counter[str]()
    for folder in folders:
        for _, below, names in os.walk(folder):
            below[:] = [name for name in below if not hidden(name)]
            counts.update(
                os.path.splitext(name)[1].lower() or "no suffix"
                for name in names
                if not hidden(name)
            )
    return ", ".join(f"{count} files with {suffix}" for suffix, count in counts.most_common(5))


def _refuse_wrapped(top: Path, name: str) -> None:
    """Raise ConfigError if all images of the only class are in its sub-folders.

    These are probably the classes, and ``images`` or ``train2017`` is a folder around them. The
    same holds for a folder inside one of the same name, such as ``seg_pred/seg_pred``.
    """
    below = folders_in(top / name)
    if name == top.name and not below:
        raise broken(
            top,
            f"would be a single class, {name}, which is also the name of the folder around it",
            "name a folder with a sub-folder per class; a flat folder needs --labels",
        )
    if not below or has_images(top / name):
        return
    raise broken(
        top,
        f"would be a single class, {name}, whose images are all in the sub-folders {some(below)}",
        f"if these are the classes, name {top / name}; if {name} is the class, put its images "
        "into the folder itself",
    )


def _refuse_ambiguous(top: Path, images: dict[str, list[str]]) -> None:
    """Raise ConfigError if the sub-folders may be the classes (below ``images``, ``masks``).

    That is so if no folder contains images itself, and two folders have two sub-folders in common,
    or the only sub-folder of one is one of several of another. A sub-folder that is the only one of
    every folder, such as Tiny-ImageNet's ``images``, is not a class.
    """
    below: dict[str, set[str]] = {}
    for name, files in images.items():
        parts = [os.path.relpath(file, top / name).split(os.sep) for file in files]
        if any(len(part) == 1 for part in parts):
            return
        below[name] = {part[0] for part in parts} if files else set(folders_in(top / name))
    pair = shared_pair(below)
    if pair is None:
        return
    first, second = pair
    shared = sorted(below[first] & below[second])
    larger = max(pair, key=lambda name: len(below[name]))
    either = sorted(
        name for name in pair if images[name] and len(below[name]) == len(below[larger])
    )
    outer = some(sorted(below))
    inner = some(sorted(below[larger]))
    folders = " or ".join(str(top / name) for name in either or [larger])
    raise broken(
        top,
        f"may have the classes {outer} or the classes {inner}: no folder contains images itself, "
        f"and {first} and {second} both have {some(shared)}",
        f"if {inner} are the classes, name {folders}; if {outer} are, put their images into the "
        "folders themselves",
    )


def shared_pair(below: dict[str, set[str]]) -> tuple[str, str] | None:
    """Return two folders that have two sub-folders in common, or None.

    A pair also counts if the only sub-folder of one is one of several of the other.
    """
    owners: dict[str, list[str]] = {}
    only = {next(iter(inside)): name for name, inside in below.items() if len(inside) == 1}
    for name, inside in below.items():
        if len(inside) == 1:
            continue
        if known := sorted(inside & only.keys()):
            return only[known[0]], name
        counts = Counter(owner for sub in inside for owner in owners.get(sub, ()))
        if counts and (most := counts.most_common(1)[0])[1] > 1:
            return most[0], name
        for sub in inside:
            owners.setdefault(sub, []).append(name)
    return None


class _Tree:
    """A walk through the folders of all classes, which counts what it finds besides images."""

    def __init__(self) -> None:
        self.other_folders: list[str] = []
        self._suffixes, self._hidden = Counter[str](), Counter[str]()
        self._hidden_files = self._special = self._stray = 0
        self._folders: dict[str, str] = {}  # real path -> path that led there
        self._links: dict[str, str] = {}  # likewise for images that are links

    def images(self, top: Path, name: str) -> list[str]:
        path = str(top / name)
        return sorted(
            self._below(path, self._entered(path, os.path.realpath(path), os.path.realpath(top)))
        )

    def _entered(self, path: str, real: str, parent: str) -> str:
        if os.path.commonpath([real, parent]) == real:
            raise broken(path, f"is a link to {real}, a folder above it", "remove the link")
        if real in self._folders:
            raise broken(
                path,
                f"is the same folder as {self._folders[real]}, reached through a link",
                "remove the link",
            )
        self._folders[real] = path
        return real

    def _below(self, path: str, real: str) -> Iterator[str]:
        with reading(path, "a folder"):
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        if splits := splits_below([e.name for e in entries if _entry_type(e) == "folder"]):
            raise broken(
                path,
                f"contains the folders {some(splits)} of splits, where a class is expected",
                f"name {os.path.join(path, splits[0])}, or {path} with --split {splits[0]}, as "
                "SOURCE; if the classes are above their splits, swap the two levels",
            )
        for entry in entries:
            below = (
                os.path.realpath(entry.path)
                if entry.is_symlink()
                else os.path.join(real, entry.name)
            )
            entry_type = _entry_type(entry)
            if hidden(entry.name):
                self._hidden[entry.name] += entry_type == "folder"
                self._hidden_files += entry_type != "folder"
            elif entry_type == "folder":
                yield from self._below(entry.path, self._entered(entry.path, below, real))
            elif entry_type == "special":
                self._special += 1
            elif not is_image(entry.name):
                suffix = os.path.splitext(entry.name)[1].lower()
                self._suffixes[suffix or "no suffix"] += 1
            else:
                if entry.is_symlink() and self._links.setdefault(below, entry.path) != entry.path:
                    raise _twice(below, self._links[below], entry.path)
                yield entry.path

    def count_stray(self, top: Path) -> None:
        """Count what is next to the folders of the classes."""
        for entry in os.scandir(top):
            if hidden(entry.name) and _entry_type(entry) == "folder":
                self._hidden[entry.name] += 1
            self._stray += (
                not hidden(entry.name) and is_image(entry.name) and _entry_type(entry) != "folder"
            )

    def check_links(self, images: dict[str, list[str]]) -> None:
        """Raise ConfigError for a link to an image that is in the tree itself."""
        inside = {
            target: os.path.join(self._folders[os.path.dirname(target)], os.path.basename(target))
            for target in self._links
            if os.path.dirname(target) in self._folders
        }
        paths = {path for of_class in images.values() for path in of_class} if inside else set()
        for target, path in inside.items():
            if path in paths and path != self._links[target]:
                raise _twice(target, path, self._links[target])

    def skipped(self) -> str:
        """Return a text that lists what the walk skipped."""
        counts = [
            f"{count} files with {suffix}" for suffix, count in sorted(self._suffixes.items())
        ]
        folders = [
            name if count == 1 else f"{name} ({count} times)"
            for name, count in sorted(self._hidden.items())
            if count
        ]
        return ", ".join(
            filter(
                None,
                [
                    *counts,
                    f"the hidden folders {some(folders)}" if folders else "",
                    f"{self._hidden_files} hidden files" if self._hidden_files else "",
                    f"{self._special} pipes or devices" if self._special else "",
                    f"{self._stray} images next to the folders" if self._stray else "",
                    f"the folders {some(self.other_folders)} next to the splits"
                    if self.other_folders
                    else "",
                ],
            )
        )


def _entry_type(entry: os.DirEntry[str]) -> str:
    """Return ``folder``, ``file`` or ``special``.

    A link to nothing is a ``file``: reading it reports the problem.
    """
    try:
        if entry.is_dir():
            return "folder"
        dangling = entry.is_symlink() and not os.path.exists(entry.path)
        return "file" if entry.is_file() or dangling else "special"
    except OSError:
        return "file"  # a link that cannot be followed


def _twice(target: str, first: str, second: str) -> ConfigError:
    return broken(
        second,
        f"is the same file as {first} ({target}), reached through a link",
        "remove the link, or replace it by a copy if the image is meant to occur twice",
    )
