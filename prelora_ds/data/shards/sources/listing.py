"""What every kind of source comes down to: a list of images, each with a label and a place."""

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

# ``length`` bytes from ``offset`` of file number ``file``; some kinds count rows there. ``block``:
# what is read as one.
ITEM = np.dtype(
    [("file", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("length", "<i8"), ("block", "<i4")]
)
# torchvision's ImageFolder takes these.
IMAGES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
# Names of splits, and which of the three each of them means.
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
MAX_CLASSES = 1_000_000  # a label beyond is a mistake, and the manifest names every class
# What Synology, macOS, Windows, ext4 and Python leave in folders.
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
    """The images of a source, of dtype ITEM, in a fixed order. ``kind`` chooses the reader.

    ``classes`` is None where the source knows its classes by number alone. ``skipped`` says what is in the source
    and is not an image of it.
    """

    source_format: str
    classes: tuple[str, ...] | None
    files: tuple[str, ...]
    items: NDArray[np.void]
    skipped: str = ""


@dataclass(frozen=True)
class Request:
    """What the user asked for: ``labels`` is a file of labels that the source lacks."""

    source: Path
    split: str | None = None
    labels: Path | None = None


def items(file: Any, label: Any, offset: Any, length: Any, block: Any = 0) -> NDArray[np.void]:
    """Rows of dtype ITEM, broadcast from columns. Raises ValueError for a label that is not a whole
    number in range."""
    labels = np.asarray(label)
    if labels.dtype.kind not in "iu" and labels.size:
        raise ValueError(
            f"labels of the type {labels.dtype}, where whole numbers of at most 32 bits are wanted"
        )
    if labels.size and max(abs(int(labels.min())), abs(int(labels.max()))) >= MAX_CLASSES:
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()}, and at most {MAX_CLASSES:,} "
            "classes can be named"
        )
    columns = np.broadcast_arrays(*map(np.asarray, (file, labels, offset, length, block)))
    rows = np.zeros(columns[0].shape, ITEM)
    for name, column in zip(ITEM.names or (), columns, strict=True):
        rows[name] = column
    return rows


def hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to a system or a program, and never to a data
    set."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_image(name: str) -> bool:
    """Whether a file of this name is an image of a data set."""
    return Path(name).suffix.lower() in IMAGES


def split_in(name: str) -> str | None:
    """The split whose name is a word of ``name``: "train" for ``train2017`` and ``seg_train``.

    Words end at digits, at anything that is not a letter, and before a capital letter; ``testset``,
    ``testdata`` and ``testimages`` count as well. None for a name without such a word, as in
    ``trainer``.
    """
    words = re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", name)
    named = (SPLITS.get(re.sub("(set|data|images)$", "", word.lower())) for word in words)
    return next(filter(None, named), None)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def choose_split(found: Sequence[str], request: Request) -> str:
    """The split asked for, or the only one. Raises ConfigError for none, and for one of many."""
    if not found:
        raise broken(
            request.source,
            "holds none of the files that this format has",
            "name the folder that holds them, or leave --format out",
        )
    if request.split is None and len(found) == 1:
        return found[0]
    if request.split is None or request.split not in found:
        raise ConfigError(
            "--split",
            request.split,
            f"{request.source} has the splits {', '.join(sorted(found))}",
            "give one of these",
        )
    return request.split


def check_parts(source: Path, what: str, found: Sequence[int], wanted: range) -> None:
    """Raises ConfigError where the numbered parts of a data set are not all there, or one twice."""
    there = Counter(found)
    if missing := len(wanted) - sum(number in wanted for number in there):
        numbers = ", ".join(str(n) for n in islice((n for n in wanted if n not in there), 5))
        raise broken(
            source,
            f"{missing} of the {len(wanted)} parts of {what} are missing: number "
            f"{numbers}{', ...' if missing > 5 else ''}",
            "fetch the missing files",
        )
    if more := [n for n, count in sorted(there.items()) if count > 1 or n not in wanted]:
        raise broken(
            source,
            f"part {more[0]} of {what} is there more than once, or beyond the last",
            "remove the files of another version",
        )


def check_classes(source: Path, names: Sequence[str]) -> None:
    """Raises ConfigError for a class name that comes twice, also as two forms of the same text in
    Unicode, and for one that cannot be written as UTF-8."""
    seen: dict[str, str] = {}  # by the name's composed form
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                "SOURCE",
                str(source),
                f"the class name {name!r} is not UTF-8, and a manifest cannot hold it",
                "rename the class, for example with convmv",
            ) from error
        # macOS writes an accent as a character of its own (NFD), and most others do not (NFC).
        composed = unicodedata.normalize("NFC", name)
        other = seen.get(composed)
        if other == name:
            raise ConfigError(
                "SOURCE",
                str(source),
                f"the class name {name!r} comes twice",
                "give every class a name of its own",
            )
        if other is not None:
            raise ConfigError(
                "SOURCE",
                str(source),
                f"the class names {other!a} and {name!a} are the same text in two forms of Unicode",
                "bring all names to one form, for example with convmv -f utf-8 -t utf-8 --nfc",
            )
        seen[composed] = name
