"""Writing shards, and two sources of images from Python packages: digits and photographs.

A source yields samples ``(key, image bytes, extension, label)``.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Literal, get_args
from uuid import uuid4

import numpy as np
from PIL import Image

from prelora_ds.data.manifest import EXTENSIONS, Manifest, save_manifest
from prelora_ds.data.shards.images import MAX_PIXELS, encode
from prelora_ds.data.shards.scan import ScannedShard, index_shard
from prelora_ds.errors import ConfigError, cannot_write

RawSample = tuple[str, bytes, str, int]

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
DIGIT_CLASSES = tuple(map(str, range(10)))
PHOTOGRAPH_CLASSES = tuple(f"imagenet-{label:03d}" for label in range(1000))
_DIGITS_IN_VAL = 360
_RATIO = 4 / 3  # maximum aspect ratio of a crop, if the photograph is large enough
_LARGER = 1.1  # maximum of a crop's short side, relative to the requested one
# The colour photographs in scikit-image's wheel (all others would be downloaded), with the ImageNet
# class that fits best.
_SKIMAGE_LABELS = {
    "astronaut.png": 812,
    "chelsea.png": 282,
    "coffee.png": 967,
    "hubble_deep_field.jpg": 727,
    "motorcycle_left.png": 670,
    "rocket.jpg": 744,
}


def write_shards(
    samples: Iterable[RawSample],
    folder: str | Path,
    *,
    samples_per_shard: int,
    class_names: Sequence[str],
) -> Manifest:
    """Write ``shard-000000.tar``, ... and their manifest into the new ``folder``.

    The same samples result in the same bytes, and ``folder`` appears atomically.

    Raises ConfigError if it exists, if there are no samples, and for a sample that a reader would
    lose: a duplicate key or one with a dot, an unknown extension, a label without a class name.
    """
    folder = Path(folder).absolute()
    if samples_per_shard < 1:
        raise ConfigError(
            "samples_per_shard",
            samples_per_shard,
            "a shard contains at least one sample",
            "give 1 or more",
        )
    _check_new(folder)
    partial = folder.with_name(f".{folder.name}.{uuid4().hex}")
    try:
        with _writing(folder):
            partial.mkdir(parents=True)
        rest = _checked(samples, len(class_names))
        shards: list[ScannedShard] = []
        while chunk := list(islice(rest, samples_per_shard)):
            path = partial / f"shard-{len(shards):06d}.tar"
            with _writing(folder):
                write_tar(path, chunk)
            shards.append(index_shard(path, "folder"))
        if not shards:
            raise ConfigError(
                "samples", 0, "the source has no samples", "give a source with images"
            )
        with _writing(folder):
            save_manifest(
                partial,
                class_names,
                [scan.shard for scan in shards],
                [scan.rows for scan in shards],
            )
            # The rename would replace an empty folder that was made in the meantime.
            if os.path.lexists(folder):
                raise ConfigError(
                    "folder",
                    str(folder),
                    "was made by another process in the meantime",
                    "give another folder",
                )
            os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Manifest.load(folder, "folder")


def write_splits(
    samples: Mapping[Split, Iterable[RawSample]],
    out: Path,
    *,
    samples_per_shard: int,
    class_names: Sequence[str],
) -> dict[Split, Manifest]:
    """Write each split to the new folder ``out``/SPLIT; return the manifests by split.

    Raises ConfigError before anything is written if one of the folders exists.
    """
    for split in samples:
        _check_new(out / split)
    return {
        split: write_shards(
            of_split, out / split, samples_per_shard=samples_per_shard, class_names=class_names
        )
        for split, of_split in samples.items()
    }


def _check_new(folder: Path) -> None:
    with _writing(folder):
        if os.path.lexists(folder):
            raise ConfigError(
                "folder", str(folder), "already exists", "remove it, or give another folder"
            )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A context that turns an OSError of writing to ``folder`` into a ConfigError or DiskError."""
    try:
        yield
    except OSError as error:
        raise cannot_write("folder", folder, error) from error


def write_tar(path: Path, samples: Iterable[RawSample]) -> None:
    """Write a shard to the new file ``path``, and sync it to the disk.

    Owner and time are fixed, so the bytes are reproducible.
    """
    # webdataset's TarWriter would import torch: 3 s and 200 MB in each worker process.
    with path.open("xb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for key, image, extension, label in samples:
                members = ((f"{key}.{extension}", image), (f"{key}.cls", str(label).encode()))
                for name, data in members:
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    member.mode = 0o444
                    tar.addfile(member, io.BytesIO(data))
        file.flush()
        os.fsync(file.fileno())


def _checked(samples: Iterable[RawSample], classes: int) -> Iterator[RawSample]:
    seen = set()
    for sample in samples:
        key, _, extension, label = sample
        if key in seen or not key or "." in key:
            raise ConfigError(
                "samples",
                key,
                "a key must be unique, not empty and without a dot",
                "number the samples",
            )
        if extension not in EXTENSIONS:
            raise ConfigError(
                "samples", f"{key}.{extension}", "unknown image format", f"use one of {EXTENSIONS}"
            )
        if not 0 <= label < classes:
            raise ConfigError(
                "samples",
                key,
                f"label {label} is outside the {classes} classes",
                "give the names of all classes",
            )
        seen.add(key)
        yield sample


def digits(split: Split, seed: int = 0) -> Iterator[RawSample]:
    """Yield scikit-learn's handwritten digits as grey 8x8 PNGs.

    There are 1,437 samples in train and 360 in val, stratified by class.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in SPLITS:
        raise ConfigError("split", split, "the digits have no such split", 'give "train" or "val"')
    images, labels = load_digits(return_X_y=True)
    train, val = train_test_split(
        np.arange(len(labels)), test_size=_DIGITS_IN_VAL, random_state=seed, stratify=labels
    )
    for index in train if split == "train" else val:
        pixels = np.rint(images[index].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        yield f"{index:06d}", encode(Image.fromarray(pixels), "PNG"), "png", int(labels[index])


def write_digits(out: Path, samples_per_shard: int = 512) -> dict[Split, Manifest]:
    """Write the digits to the new folders ``out``/train and ``out``/val.

    Returns the manifests by split.
    """
    return write_splits(
        {split: digits(split) for split in SPLITS},
        out,
        samples_per_shard=samples_per_shard,
        class_names=DIGIT_CLASSES,
    )


def photographs(count: int, seed: int = 0, short_side: int = 400) -> Iterator[RawSample]:
    """Yield ``count`` different JPEGs like ImageNet's, with a short side of ``short_side`` +- 10 %.

    They are crops of the photographs in the wheel of scikit-image and, if it is installed, of
    foolbox (20 of ImageNet); nothing is downloaded. Labels are ImageNet's 0..999.

    Raises ConfigError if neither package is installed, and for a short side with which an image
    could have more pixels than are decoded.
    """
    files = _photograph_files()
    widest = max(_RATIO, *(width / height for width, height in map(_size, files)))
    most = int(math.sqrt(MAX_PIXELS / widest) / _LARGER)
    if short_side > most:
        raise ConfigError(
            "--short-side",
            short_side,
            f"images of more than {MAX_PIXELS:,} pixels are not decoded",
            f"give {most} or less",
        )
    return _crops(files, count, seed, short_side)


def _size(file: tuple[Path, int]) -> tuple[int, int]:
    with Image.open(file[0]) as image:
        return image.size


def _crops(
    files: list[tuple[Path, int]], count: int, seed: int, short_side: int
) -> Iterator[RawSample]:
    pictures = [Image.open(file).convert("RGB") for file, _ in files]
    for number in range(count):
        rng, chosen = np.random.default_rng((seed, number)), number % len(files)
        picture = pictures[chosen]
        share, ratio = (
            rng.uniform(0.3, 1.0),
            np.exp(rng.uniform(np.log(1 / _RATIO), np.log(_RATIO))),
        )
        width = min(np.sqrt(share * picture.width * picture.height * ratio), picture.width)
        height = min(width / ratio, picture.height)
        left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
        scale = short_side * rng.uniform(0.9, _LARGER) / min(width, height)
        size = (round(width * scale), round(height * scale))
        crop = picture.resize(
            size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
        )
        yield f"{number:08d}", encode(crop, "JPEG", quality=92), "jpg", files[chosen][1]


def _photograph_files() -> list[tuple[Path, int]]:
    """Return (file, label) of the photographs.

    They are located through the packages' folders: importing foolbox would import its
    dependencies.
    """
    skimage, foolbox = (
        Path(spec.submodule_search_locations[0]) / "data"
        if (spec := find_spec(package)) and spec.submodule_search_locations
        else None
        for package in ("skimage", "foolbox")
    )
    files = [(skimage / name, label) for name, label in _SKIMAGE_LABELS.items()] if skimage else []
    if foolbox:  # imagenet_NUMBER_LABEL.jpg
        files += [
            (file, int(file.stem.rpartition("_")[2]))
            for file in sorted(foolbox.glob("imagenet_*.jpg"))
        ]
    if not files:
        raise ConfigError(
            "source",
            "photographs",
            "needs the images in scikit-image or foolbox",
            "pip install scikit-image, or pip install --no-deps foolbox==3.3.4",
        )
    return files
