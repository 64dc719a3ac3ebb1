"""The plan of `prelora shards build`: the requested options, and the images in their order.

It is in ``OUT.partial/work`` while the shards are being made: ``plan.json`` and ``items.npy``.
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

_WINDOW = 16  # blocks whose images are shuffled together


@dataclass(frozen=True)
class Options:
    """The options that, together with the source, determine the bytes of the shards."""

    samples_per_shard: int = 1024
    seed: int = 0
    resize_short: int | None = None
    quality: int = 90
    skip_bad: bool = False


def resolved(path: Path) -> Path:
    """Return the absolute path without links: a build may be continued from another folder."""
    return Path(os.path.realpath(path))


def misplaced_error(source: Path, out: Path) -> ConfigError | None:
    """Return the error if one of the two folders is inside the other."""
    target = resolved(out)
    partial = target.with_name(f"{target.name}.partial") if target.name else target
    if source in (target, partial) or target in source.parents or partial in source.parents:
        return ConfigError(
            "OUT",
            str(out),
            f"SOURCE is inside of it, at {source}",
            "name a new folder next to SOURCE",
        )
    if source in target.parents and source.is_dir():
        return ConfigError(
            "OUT",
            str(out),
            f"it is inside of SOURCE, {source}, and would be read as a part of it",
            "name a folder outside of SOURCE",
        )
    return None


def requested_options(
    request: Request, options: Options, source_format: str | None, like: Path | None
) -> dict[str, Any]:
    """Return everything that determines the shards, by the name of the option."""
    paths = {"SOURCE": request.source, "--labels": request.labels, "--like": like}
    settings = {f"--{name.replace('_', '-')}": value for name, value in asdict(options).items()}
    return {
        **{name: None if path is None else str(path) for name, path in paths.items()},
        "--split": request.split,
        "--format": source_format,
        **settings,
        "Pillow": PIL.__version__,
    }


def check_same_options(requested: dict[str, Any], planned: dict[str, Any], partial: Path) -> None:
    """Raise ConfigError if the unfinished build in ``partial`` has other options."""
    for key, value in requested.items():
        if planned.get(key) != value:
            raise ConfigError(
                key,
                value,
                f"the unfinished build in {partial} has {planned.get(key)!r}",
                "give the same options to continue it, or remove that folder to start over",
            )


def with_skip_bad(planned: dict[str, Any], options: Options) -> dict[str, Any]:
    """Return the planned options, with --skip-bad added if it is new.

    Shards without a bad image are the same with and without it.
    """
    added = {"--skip-bad": True} if options.skip_bad else {}
    return {"--skip-bad": False} | planned | added


@contextmanager
def announced(work: Path) -> Iterator[None]:
    """A context in which the folder ``work`` exists while rank 0 makes the plan.

    If no plan comes of it, the folder is removed again: this tells the other ranks, which wait for
    the plan, to stop waiting.
    """
    existed = work.parent.exists()
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not (work / "plan.json").exists():
            time.sleep(LONGEST_PAUSE_S + 1)  # until all ranks have seen the folder
            shutil.rmtree(work if existed else work.parent)


def write_plan(
    work: Path,
    requested: dict[str, Any],
    request: Request,
    source_format: str | None,
    options: Options,
    like: Path | None,
) -> None:
    """List the images of the source and write the plan into ``work``.

    Raises ConfigError if the folder around ``work`` contains anything else, and for a source with
    mistakes.
    """
    if work.parent.is_dir() and (foreign := sorted(set(os.listdir(work.parent)) - {work.name})):
        raise ConfigError(
            "OUT",
            str(work.parent),
            f"this folder is not an unfinished build, it contains {foreign[0]!r}",
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
        "asked": requested,
        "kind": listing.source_format,
        "classes": classes,
        "files": listing.files,
        "passed_over": listing.skipped,
    }
    replace_file(work / "plan.json", json.dumps(plan).encode())


def read_plan(work: Path) -> tuple[dict[str, Any], NDArray[np.void]]:
    """Return the content of ``plan.json``, and the images as rows of dtype ITEM.

    Raises FileNotFoundError without a plan, and ConfigError for a damaged one.
    """
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
            "remove that folder to start over",
        ) from error


def _classes(
    listing: Listing, like: Sequence[str] | None, like_path: str
) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Return (class names, label of each item).

    Raises ConfigError for a label without a class, and for a class that ``like`` does not have.
    """
    labels = listing.items["label"]
    named = listing.classes
    lowest, highest = int(labels.min()), int(labels.max())
    if named is not None:
        count = len(named)
    elif like is not None:
        count = len(like)
    else:
        count = highest + 1
    if lowest < 0 or highest >= count:
        index = int(np.argmax((labels < 0) | (labels >= count)))
        item = listing.items[index]
        raise ConfigError(
            "SOURCE",
            listing.files[item["file"]],
            f"image {index} of the source ({item['offset']} in this file) has the label "
            f"{labels[index]}, and there are only {count} classes",
            "correct the labels",
        )
    if named is None:
        names = tuple(like) if like is not None else tuple(map(str, range(count)))
        return names, labels
    if like is None:
        return named, labels
    numbers = {name: number for number, name in enumerate(like)}
    if unknown := [name for name in named if name not in numbers]:
        composed = unicodedata.normalize("NFC", unknown[0])
        same_text = [name for name in like if unicodedata.normalize("NFC", name) == composed]
        first = f"{unknown[0]!r}"
        remedy = "name shards of the same data set"
        if same_text:
            first = f"{unknown[0]!a}; {same_text[0]!a} is the same text in another Unicode form"
            remedy = "convert the names to one form, for example with "
            remedy += "convmv -f utf-8 -t utf-8 --nfc"
        raise ConfigError(
            "--like",
            like_path,
            f"{len(unknown)} classes of the source are not among its classes, the first is {first}",
            remedy,
        )
    return tuple(like), np.array([numbers[name] for name in named], np.int32)[labels]


def shuffled(items: NDArray[np.void], seed: int) -> NDArray[np.int64]:
    """Return a permutation of the items, a function of ``seed``.

    If the source is read in blocks, blocks are shuffled, and images within windows of blocks.
    """
    # As in `epoch_order`: NumPy guarantees only the raw bit stream across versions.
    bits = np.random.PCG64(np.random.SeedSequence(seed))
    order = np.argsort(bits.random_raw(len(items)), kind="stable")
    blocks = np.stack([items["file"], items["block"]], axis=1)
    if not items["block"].any():
        return order
    numbers = np.unique(blocks, axis=0, return_inverse=True)[1].reshape(-1)
    block_order = np.argsort(bits.random_raw(numbers.max() + 1), kind="stable")
    rank_of_block = np.argsort(block_order, kind="stable")
    return order[np.argsort(rank_of_block[numbers[order]] // _WINDOW, kind="stable")]
