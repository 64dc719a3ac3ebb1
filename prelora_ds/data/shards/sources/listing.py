"""The common form of all sources: a list of images, each with a label and a location."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prelora_ds.data.shards.reading import broken
from prelora_ds.errors import ConfigError

# An image: ``length`` bytes from ``offset`` of file number ``file``. Some formats count rows instead
# of bytes. ``block`` is the number of the part of the file that is read at once.
ITEM = np.dtype(
    [("file", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("length", "<i8"), ("block", "<i4")]
)
# The extensions that torchvision's ImageFolder accepts.
IMAGES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
# Names of splits, and the split that each of them means.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
    "testing": "test",
}
MAX_CLASSES = 1_000_000  # a larger label is a mistake; the manifest names every class
# Folders that Synology, macOS, Windows, ext4 and Python create.
_SYSTEM = {
    "@eadir",
    "__macosx",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "__pycache__",
}


@dataclass(frozen=True)
class Listing:
    """The images of a source, as rows ``items`` of dtype ITEM in a fixed order.

    source_format: a key of `SOURCE_FORMATS`.
    classes: the class names; None if the source has only numbers.
    skipped: a text that lists what the source contains besides its images.
    """

    source_format: str
    classes: tuple[str, ...] | None
    files: tuple[str, ...]
    items: NDArray[np.void]
    skipped: str = ""


@dataclass(frozen=True)
class Request:
    """The source and options of a user; ``labels`` is a file of labels that the source lacks."""

    source: Path
    split: str | None = None
    labels: Path | None = None


def items(file: Any, label: Any, offset: Any, length: Any, block: Any = 0) -> NDArray[np.void]:
    """Return rows of dtype ITEM, broadcast from columns.

    Raises ValueError for a label that is not an integer below MAX_CLASSES.
    """
    labels = np.asarray(label)
    if labels.dtype.kind not in "iu" and labels.size:
        raise ValueError(
            f"labels have the type {labels.dtype}, expected integers of at most 32 bits"
        )
    if labels.size and max(abs(int(labels.min())), abs(int(labels.max()))) >= MAX_CLASSES:
        raise ValueError(
            f"labels range from {labels.min()} to {labels.max()}, and at most {MAX_CLASSES:,} "
            "classes are possible"
        )
    columns = np.broadcast_arrays(*map(np.asarray, (file, labels, offset, length, block)))
    rows = np.zeros(columns[0].shape, ITEM)
    for name, column in zip(ITEM.names or (), columns, strict=True):
        rows[name] = column
    return rows


def hidden(name: str) -> bool:
    """Return whether a file or folder of this name belongs to a system or a program.

    Such a file is never a part of a data set.
    """
    return name.startswith(".") or name.lower() in _SYSTEM


def is_image(name: str) -> bool:
    """Return whether a file of this name is an image of a data set."""
    return Path(name).suffix.lower() in IMAGES


def split_in(name: str) -> str | None:
    """Return the split whose name is a word of ``name``: "train" for ``train2017``, ``seg_train``.

    Words end at digits, at anything that is not a letter, and before a capital letter; ``testset``,
    ``testdata`` and ``testimages`` count as well. Returns None for a name without such a word, such
    as ``trainer``.
    """
    words = re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", name)
    named = (SPLITS.get(re.sub("(set|data|images)$", "", word.lower())) for word in words)
    return next(filter(None, named), None)


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first ``most`` names as a text, with the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def choose_split(splits: Sequence[str], request: Request) -> str:
    """Return the requested split, or the only one.

    Raises ConfigError if there are none, and if none of several is requested.
    """
    if not splits:
        raise broken(
            request.source,
            "contains none of the files of this format",
            "name the folder that contains them, or omit --format",
        )
    if request.split is None and len(splits) == 1:
        return splits[0]
    if request.split is None or request.split not in splits:
        raise ConfigError(
            "--split",
            request.split,
            f"{request.source} has the splits {', '.join(sorted(splits))}",
            "give one of these",
        )
    return request.split


def check_parts(source: Path, what: str, numbers: Sequence[int], wanted: range) -> None:
    """Raise ConfigError unless each numbered part of a data set exists exactly once."""
    counts = Counter(numbers)
    if missing := len(wanted) - sum(number in wanted for number in counts):
        first_missing = ", ".join(str(n) for n in islice((n for n in wanted if n not in counts), 5))
        raise broken(
            source,
            f"{missing} of the {len(wanted)} parts of {what} are missing: number "
            f"{first_missing}{', ...' if missing > 5 else ''}",
            "fetch the missing files",
        )
    if more := [n for n, count in sorted(counts.items()) if count > 1 or n not in wanted]:
        raise broken(
            source,
            f"part {more[0]} of {what} exists more than once, or is beyond the last",
            "remove the files of another version",
        )


def check_classes(source: Path, names: Sequence[str]) -> None:
    """Raise ConfigError for a duplicate class name, and for one that cannot be written as UTF-8.

    Names that are the same text in two Unicode forms are duplicates too.
    """
    seen: dict[str, str] = {}  # composed form -> name
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                "SOURCE",
                str(source),
                f"the class name {name!r} is not UTF-8, and a manifest cannot contain it",
                "rename the class, for example with convmv",
            ) from error
        # macOS writes an accent as a separate character (NFD), and most other systems do not (NFC).
        composed = unicodedata.normalize("NFC", name)
        other = seen.get(composed)
        if other == name:
            raise ConfigError(
                "SOURCE",
                str(source),
                f"the class name {name!r} occurs twice",
                "give every class a unique name",
            )
        if other is not None:
            raise ConfigError(
                "SOURCE",
                str(source),
                f"the class names {other!a} and {name!a} are the same text in two Unicode forms",
                "convert all names to one form, for example with convmv -f utf-8 -t utf-8 --nfc",
            )
        seen[composed] = name
