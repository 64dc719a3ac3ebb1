"""The plan of `prelora shards build`: what was asked for, and the images in their order.

It lies in ``OUT.partial/work`` while the shards are being made: ``plan.json`` and ``items.npy``.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from prelora_ds.data.manifest import Manifest
from prelora_ds.data.shards.reading import describe, reading
from prelora_ds.data.shards.sources import find_images
from prelora_ds.data.shards.sources.listing import Listing, Request
from prelora_ds.data.shards.waiting import LONGEST_PAUSE_S
from prelora_ds.errors import ConfigError
from prelora_ds.files import replace_file

_WINDOW = 16  # blocks of a file that are shuffled together


@dataclass(frozen=True)
class Options:
    """What, beside the source, fixes the bytes of the shards."""

    samples_per_shard: int = 1024
    seed: int = 0
    resize_short: int | None = None
    quality: int = 90
    skip_bad: bool = False


def resolved(path: Path) -> Path:
    """The path without links and from the root: a build may be continued from another folder."""
    return Path(os.path.realpath(path))


def misplaced_error(source: Path, out: Path) -> ConfigError | None:
    """What is wrong where one of the two folders is inside the other."""
    target = resolved(out)
    partial = target.with_name(f"{target.name}.partial") if target.name else target
    if source in (target, partial) or target in source.parents or partial in source.parents:
        return ConfigError(
            "OUT",
            str(out),
            f"SOURCE is inside of it, at {source}",
            "name a new folder beside SOURCE",
        )
    if source in target.parents and source.is_dir():
        return ConfigError(
            "OUT",
            str(out),
            f"it is inside of SOURCE, {source}, and would be taken for a part of it",
            "name a folder outside of SOURCE",
        )
    return None


def what_is_asked(
    request: Request, options: Options, source_format: str | None, like: Path | None
) -> dict[str, Any]:
    paths = {"SOURCE": request.source, "--labels": request.labels, "--like": like}
    settings = {f"--{name.replace('_', '-')}": value for name, value in asdict(options).items()}
    return {
        **{name: None if path is None else str(path) for name, path in paths.items()},
        "--split": request.split,
        "--format": source_format,
        **settings,
        "Pillow": PIL.__version__,
    }


def check_same(asked: dict[str, Any], planned: dict[str, Any], partial: Path) -> None:
    for key, value in asked.items():
        if planned.get(key) != value:
            raise ConfigError(
                key,
                value,
                f"the unfinished build in {partial} has {planned.get(key)!r}",
                "give the same options to continue it, or remove that folder to begin anew",
            )


def with_skip_bad(planned: dict[str, Any], options: Options) -> dict[str, Any]:
    """What was asked for, with --skip-bad added where it is new: shards without a bad image are the
    same with it."""
    return {"--skip-bad": False} | planned | ({"--skip-bad": True} if options.skip_bad else {})


@contextmanager
def announced(work: Path) -> Iterator[None]:
    """The folder ``work`` is there while rank 0 makes the plan; without a plan it goes again.

    Other ranks, which wait for the plan, see by that when they wait in vain.
    """
    begun = work.parent.exists()
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not (work / "plan.json").exists():
            time.sleep(LONGEST_PAUSE_S + 1)  # so that all have seen that it was there
            shutil.rmtree(work if begun else work.parent)


def write_plan(
    work: Path,
    asked: dict[str, Any],
    request: Request,
    source_format: str | None,
    options: Options,
    like: Path | None,
) -> None:
    if work.parent.is_dir() and (foreign := sorted(set(os.listdir(work.parent)) - {work.name})):
        raise ConfigError(
            "OUT",
            str(work.parent),
            f"this folder is not an unfinished build, it holds {foreign[0]!r}",
            "move it away, or give another OUT",
        )
    like_classes = None
    if like is not None:
        with reading(like, "a manifest", "--like"):
            like_classes = Manifest.load(like, "--like").classes
    listing = find_images(request, source_format)
    classes, labels = _classes(listing, like_classes, str(like))
    items = listing.items.copy()
    items["label"] = labels
    work.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, items[shuffled(items, options.seed)], allow_pickle=False)
    replace_file(work / "items.npy", buffer.getvalue())
    plan = {
        "asked": asked,
        "kind": listing.source_format,
        "classes": classes,
        "files": listing.files,
        "passed_over": listing.skipped,
    }
    replace_file(work / "plan.json", json.dumps(plan).encode())


def read_plan(work: Path) -> tuple[dict[str, Any], NDArray[np.void]]:
    try:
        plan = json.loads((work / "plan.json").read_text())
        if not {"asked", "kind", "classes", "files", "passed_over"} <= plan.keys():
            raise KeyError("a key is missing")
        return plan, np.load(work / "items.npy", allow_pickle=False)
    except (ValueError, KeyError, AttributeError, EOFError) as error:
        raise ConfigError(
            "OUT",
            str(work.parent),
            f"the plan of this unfinished build is damaged ({describe(error)})",
            "remove that folder to begin anew",
        ) from error


def _classes(
    listing: Listing, like: Sequence[str] | None, like_path: str
) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """(class names, label of each item). Raises ConfigError for a label or a name that is of no
    class."""
    labels, named = listing.items["label"], listing.classes
    lowest, highest = int(labels.min()), int(labels.max())
    count = len(named if named is not None else like if like is not None else range(highest + 1))
    if lowest < 0 or highest >= count:
        index = int(np.argmax((labels < 0) | (labels >= count)))
        item = listing.items[index]
        raise ConfigError(
            "SOURCE",
            listing.files[item["file"]],
            f"image {index} of the source ({item['offset']} in this file) has the label "
            f"{labels[index]}, and there are {count} classes",
            "correct the labels",
        )
    if named is None:
        return tuple(like) if like is not None else tuple(map(str, range(count))), labels
    if like is None:
        return named, labels
    numbers = {name: number for number, name in enumerate(like)}
    if unknown := [name for name in named if name not in numbers]:
        first = unicodedata.normalize("NFC", unknown[0])
        other = next((name for name in like if unicodedata.normalize("NFC", name) == first), None)
        raise ConfigError(
            "--like",
            like_path,
            f"{len(unknown)} classes of the source are not among its classes, the first is "
            + (
                f"{unknown[0]!r}"
                if other is None
                else f"{unknown[0]!a}; {other!a} is the same text in another form of Unicode"
            ),
            "name the shards of the same data set"
            if other is None
            else "bring the names to one form, for example with convmv -f utf-8 -t utf-8 --nfc",
        )
    return tuple(like), np.array([numbers[name] for name in named], np.int32)[labels]


def shuffled(items: NDArray[np.void], seed: int) -> NDArray[np.int64]:
    """A shuffle by ``seed``; of blocks, and of images within windows of blocks, where images are
    read by the block."""
    # As in `epoch_order`: NumPy keeps the raw stream of a bit generator for good, but not what is
    # made of it.
    bits = np.random.PCG64(np.random.SeedSequence(seed))
    order = np.argsort(bits.random_raw(len(items)), kind="stable")
    blocks = np.stack([items["file"], items["block"]], axis=1)
    if not items["block"].any():
        return order
    numbers = np.unique(blocks, axis=0, return_inverse=True)[1].reshape(-1)
    place = np.argsort(
        np.argsort(bits.random_raw(numbers.max() + 1), kind="stable"),
        kind="stable",
    )
    return order[np.argsort(place[numbers[order]] // _WINDOW, kind="stable")]
