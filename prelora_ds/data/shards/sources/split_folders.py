"""Which folders of a tree are those of splits (train, val, test), and which are classes."""

from __future__ import annotations

from pathlib import Path

from prelora_ds.data.shards.sources.listing import SPLITS, Request, hidden, is_image, some, split_in
from prelora_ds.errors import ConfigError


def split_folders(top: Path, names: list[str], request: Request) -> list[str]:
    """Those of the folders that are splits. Raises ConfigError where they may as well be
    classes."""
    named = _exact(top, names) or _alike(top, names)
    others = [name for name in names if name not in named]
    if not named or not others or request.split in named:
        return named
    raise ConfigError(
        "SOURCE",
        str(top),
        f"has folders with the names of splits ({some(named)}) beside other folders "
        f"({some(others)})",
        f"give --split {named[0]}, or name {top / named[0]}; if all of them are classes, rename "
        f"{some(named)}",
    )


def _exact(top: Path, names: list[str]) -> list[str]:
    """The folders whose whole name is that of a split, where they can be splits."""
    named = [name for name in names if name.lower() in SPLITS]
    # CIFAR-100 has a class "train": a single folder of this name that holds the images themselves
    # is a class.
    if len(named) == 1 < len(names) and not folders_in(top / named[0]):
        return []
    # ``train`` beside ``test_set``: once there is one, a similar name is a split as well.
    return [name for name in names if split_in(name)] if named else []


def _alike(top: Path, names: list[str]) -> list[str]:
    """The folders such as ``train2017`` or ``seg_test``, where they can be splits.

    Names alone do not tell: ``passenger_train`` is a good class. They are splits if there is no
    other folder and they are of different splits, or if images lie only in sub-folders that they
    have in common.
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
    # One of them beside one other folder: ``train2017`` beside ``unlabeled2017``.
    return shared or (list(nested) if len(nested) == 1 and len(names) == 2 else [])


def _classes_below(path: Path) -> list[str]:
    """The sub-folders of a folder, empty if it holds images itself.

    A single sub-folder of the folder's own name, as in ``seg_train/seg_train``, is looked into.
    """
    if has_images(path):
        return []
    below = folders_in(path)
    return _classes_below(path / path.name) if below == [path.name] else below


def has_images(path: Path) -> bool:
    """Whether a folder itself holds an image. Raises OSError."""
    return any(
        not hidden(entry.name) and is_image(entry.name) and not entry.is_dir()
        for entry in path.iterdir()
    )


def splits_below(names: list[str]) -> list[str]:
    """The splits among the sub-folders of a class, where there are several."""
    if len(exact := [name for name in names if name.lower() in SPLITS]) > 1:
        return exact
    shown = [name for name in names if not hidden(name)]
    return (
        shown
        if len(set(filter(None, map(split_in, shown)))) > 1 and all(map(split_in, shown))
        else []
    )


def folders_in(path: Path) -> list[str]:
    """The names of the sub-folders that may belong to a data set, sorted. Raises OSError."""
    return sorted(
        entry.name for entry in path.iterdir() if not hidden(entry.name) and entry.is_dir()
    )
