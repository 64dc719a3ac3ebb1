"""Deciding which folders of a tree are splits (train, val, test), and which are classes."""

from __future__ import annotations

from pathlib import Path

from prelora_ds.data.shards.sources.listing import SPLITS, Request, hidden, is_image, some, split_in
from prelora_ds.errors import ConfigError


def split_folders(top: Path, names: list[str], request: Request) -> list[str]:
    """Return the folders that are splits. Raises ConfigError if they may be classes as well."""
    named = _exact(top, names) or _alike(top, names)
    others = [name for name in names if name not in named]
    if not named or not others or request.split in named:
        return named
    raise ConfigError(
        "SOURCE",
        str(top),
        f"has folders with the names of splits ({some(named)}) next to other folders "
        f"({some(others)})",
        f"give --split {named[0]}, or name {top / named[0]}; if all of them are classes, rename "
        f"{some(named)}",
    )


def _exact(top: Path, names: list[str]) -> list[str]:
    """Return the folders whose whole name is that of a split, if they can be splits."""
    named = [name for name in names if name.lower() in SPLITS]
    # CIFAR-100 has a class "train": a single folder of this name that contains images itself is a
    # class.
    if len(named) == 1 < len(names) and not folders_in(top / named[0]):
        return []
    # For example ``train`` next to ``test_set``: with one split, a similar name is a split as well.
    return [name for name in names if split_in(name)] if named else []


def _alike(top: Path, names: list[str]) -> list[str]:
    """Return the folders with names such as ``train2017`` or ``seg_test``, if they can be splits.

    The names are not enough: ``passenger_train`` is a plausible class. The folders are splits if
    there are no others and they name different splits, or if their images are only in sub-folders
    that they have in common.
    """
    named = [name for name in names if split_in(name)]
    if len(named) == len(names) and len({split_in(name) for name in named}) > 1:
        return named
    nested = {name: set(_classes_below(top / name)) for name in named}
    nested = {name: below for name, below in nested.items() if below}
    shared = [
        name
        for name, below in nested.items()
        if any(below & nested[other] for other in nested if other != name)
    ]
    # Or one of them next to one other folder: ``train2017`` next to ``unlabeled2017``.
    return shared or (list(nested) if len(nested) == 1 and len(names) == 2 else [])


def _classes_below(path: Path) -> list[str]:
    """Return the sub-folders of a folder, and none if it contains images itself.

    For a single sub-folder with the folder's own name, as in ``seg_train/seg_train``, return the
    sub-folders of that.
    """
    if has_images(path):
        return []
    below = folders_in(path)
    return _classes_below(path / path.name) if below == [path.name] else below


def has_images(path: Path) -> bool:
    """Return whether a folder itself contains an image. Raises OSError."""
    return any(
        not hidden(entry.name) and is_image(entry.name) and not entry.is_dir()
        for entry in path.iterdir()
    )


def splits_below(names: list[str]) -> list[str]:
    """Return the splits among the sub-folders of a class, if there are several."""
    if len(exact := [name for name in names if name.lower() in SPLITS]) > 1:
        return exact
    visible = [name for name in names if not hidden(name)]
    splits = {split_in(name) for name in visible}
    return visible if len(splits) > 1 and None not in splits else []


def folders_in(path: Path) -> list[str]:
    """Return the sorted names of the sub-folders that may be of a data set. Raises OSError."""
    return sorted(
        entry.name for entry in path.iterdir() if not hidden(entry.name) and entry.is_dir()
    )
