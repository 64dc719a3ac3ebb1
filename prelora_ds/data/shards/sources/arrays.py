"""Sources of raw pixels, which become PNGs: MNIST's idx files and CIFAR's batches."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prelora_ds.data.shards.images import encode
from prelora_ds.data.shards.reading import broken, read_text, read_whole, reading, version
from prelora_ds.data.shards.sources.listing import (
    Listing,
    Request,
    check_parts,
    choose_split,
    hidden,
    items,
)

IDX, CIFAR = "idx", "cifar"
_IDX_NAME = re.compile(
    r"(?P<split>.*?)[-_.]?(?P<what>images|labels)[-.]idx(?P<axes>[13])-ubyte(\.gz)?"
)
_CIFAR_SPLITS = {
    "train": re.compile(r"(data_batch_(?P<part>\d+)|train)(\.bin)?"),
    "test": re.compile(r"(test_batch|test)(\.bin)?"),
}
_COMMON_NAMES = ("train", "test")
_CIFAR_10_PARTS = range(1, 6)


def detect_idx(source: Path) -> Path | None:
    return next((path for path, _ in _idx_files(source)), None) if source.is_dir() else None


def _idx_files(source: Path) -> list[tuple[Path, re.Match[str]]]:
    return [
        (path, match)
        for path in sorted(source.iterdir())
        if not hidden(path.name) and (match := _IDX_NAME.fullmatch(path.name)) and not path.is_dir()
    ]


def find_idx(request: Request) -> Listing:
    """List the images of MNIST-style pairs of files, such as ``train-images-idx3-ubyte[.gz]``.

    ``t10k`` is the split ``test``. Raises ConfigError if a file's header states another size, and
    if the numbers of images and labels differ.
    """
    files: dict[str, dict[str, Path]] = {}  # split -> "images" or "labels" -> file
    skipped = []
    for path, match in _idx_files(request.source):
        split_files = files.setdefault(match["split"].replace("t10k", "test") or "all", {})
        kept = split_files.setdefault(match["what"], path)
        if kept != path:  # in sorted order the plain file comes before the packed one
            skipped.append(f"{path.name} in favour of {kept.name}")
    split = choose_split(list(files), request)
    if files[split].keys() != {"images", "labels"}:
        raise broken(
            request.source,
            f"split {split} has only the {' and '.join(files[split])} file",
            "fetch the missing file",
        )
    images = idx_array(str(files[split]["images"]))
    labels = idx_array(str(files[split]["labels"]))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise broken(
            files[split]["images"],
            f"images of shape {images.shape}, labels of shape {labels.shape}",
        )
    rows = items(0, labels, range(len(labels)), 1)
    return Listing(IDX, None, (str(files[split]["images"]),), rows, ", ".join(skipped))


def read_idx(file: str, row: int, _: int) -> bytes:
    return encode(Image.fromarray(_cached_idx(file, version(file))[row]), "PNG")


def idx_array(file: str) -> NDArray[np.uint8]:
    """Return the array in an idx file. Raises ConfigError unless it is complete and of bytes."""
    data = read_whole(Path(file))
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise broken(file, "is not an idx file of unsigned bytes")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape))
    if body.size != math.prod(shape):
        raise broken(file, f"{body.size} bytes do not match the shape {shape}")
    return body.reshape(shape)


@lru_cache(maxsize=2)
def _cached_idx(file: str, _: tuple[int, int, int]) -> NDArray[np.uint8]:
    return idx_array(file)


def detect_cifar(source: Path) -> Path | None:
    """Return a batch of CIFAR in the folder, if any. Raises OSError for an unreadable file."""
    files = (path for paths in _cifar_files(source).values() for path in paths)
    return next((path for path in files if _looks_like_a_batch(path)), None)


def _looks_like_a_batch(path: Path) -> bool:
    """Return whether a file is a batch of CIFAR.

    The name decides if no other data set uses it, otherwise the content: files named ``train`` and
    ``test``, as in CIFAR-100, may also be lists of files.
    """
    if path.name not in _COMMON_NAMES:
        return True
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO


def _cifar_files(source: Path) -> dict[str, list[Path]]:
    files = [path for path in sorted(source.iterdir()) if path.is_file()] if source.is_dir() else []
    by_split = {
        split: [path for path in files if name.fullmatch(path.name)]
        for split, name in _CIFAR_SPLITS.items()
    }
    return {split: paths for split, paths in by_split.items() if paths}


def find_cifar(request: Request) -> Listing:
    """List the images of CIFAR-10 or -100 (fine labels), in the python or the binary version.

    The python version is pickled. It is read by an unpickler that can create only arrays of numbers
    and containers; the binary version needs no such care. Raises ConfigError for damaged files, and
    for a pickle that asks for anything else.
    """
    files_by_split = _cifar_files(request.source)
    split = choose_split(list(files_by_split), request)
    files = files_by_split[split]
    rows = []
    for number, path in enumerate(files):
        labels = cifar_batch(str(path))[1]
        rows.append(items(number, labels, range(len(labels)), 1))
    _check_files(request.source, split, files)
    return Listing(
        CIFAR, _cifar_classes(request.source), tuple(map(str, files)), np.concatenate(rows)
    )


def _check_files(source: Path, split: str, files: list[Path]) -> None:
    """Raise ConfigError for a missing batch, and if both versions are in one folder."""
    if len({path.suffix for path in files}) > 1:
        raise broken(
            source,
            f"contains the python and the binary version of the split {split}",
            "keep only one of the two in the folder",
        )
    names = [_CIFAR_SPLITS["train"].fullmatch(path.name) for path in files]
    parts = [int(name["part"]) for name in names if name and name["part"]]
    if parts and len(parts) < len(files):
        raise broken(source, "contains CIFAR-10 and CIFAR-100", "use a separate folder for each")
    if parts:
        check_parts(source, "CIFAR-10's data_batch", parts, _CIFAR_10_PARTS)


def read_cifar(file: str, row: int, _: int) -> bytes:
    pixels = _cached_cifar(file, version(file))[0][row]
    return encode(Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)), "PNG")


def cifar_batch(file: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return (pixels uint8 [N, 3072], labels int64 [N])."""
    data = read_whole(Path(file))
    if file.endswith(".bin"):
        extra = (
            2 if Path(file).name in ("train.bin", "test.bin") else 1
        )  # CIFAR-100 has the coarse label first
        if not data or len(data) % (3072 + extra):
            raise broken(
                file, f"{len(data)} bytes are not a whole number of records of {3072 + extra}"
            )
        table = np.frombuffer(data, np.uint8).reshape(-1, 3072 + extra)
        return table[:, extra:], table[:, extra - 1].astype(np.int64)
    content = _unpickle(file, data)
    with reading(file, "a batch of CIFAR"):
        labels = content["fine_labels"] if "fine_labels" in content else content["labels"]
        pixels = content["data"]
        # Nested lists are not converted to an array: a small pickle can nest one list so often that
        # the result does not fit into memory.
        if (
            not isinstance(pixels, np.ndarray)
            or not isinstance(labels, list)
            or not all(isinstance(label, int) for label in labels)
        ):
            raise ValueError("its data are not an array, or its labels are not a list of integers")
        numbers = np.asarray(labels, np.int64)
        if pixels.dtype != np.uint8 or pixels.shape != (len(numbers), 3072):
            raise ValueError(
                f"{pixels.dtype} pixels of shape {pixels.shape} for {len(numbers)} labels"
            )
    return pixels, numbers


@lru_cache(maxsize=6)  # all batches of CIFAR-10
def _cached_cifar(
    file: str, _: tuple[int, int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return cifar_batch(file)


def _cifar_classes(folder: Path) -> tuple[str, ...]:
    for name in ("batches.meta.txt", "fine_label_names.txt"):
        if (folder / name).is_file():
            lines = map(str.strip, read_text(folder / name).split("\n"))
            return tuple(line for line in lines if line)
    for name in ("batches.meta", "meta"):
        if (folder / name).is_file():
            content = _unpickle(str(folder / name), read_whole(folder / name))
            for key in ("label_names", "fine_label_names"):
                names = content.get(key)
                if isinstance(names, list) and all(isinstance(name, str) for name in names):
                    return tuple(names)
    raise broken(
        folder,
        "lacks the names of the classes (in batches.meta, meta, or the .txt beside .bin)",
        "fetch the missing file",
    )


class _NumbersOnly(pickle.Unpickler):
    """An unpickler that creates only arrays of numbers and plain containers."""

    # NumPy 2 renamed numpy.core, which older files use, to numpy._core.
    _ALLOWED = {
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct",)
    } | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no batch of CIFAR needs"
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickle(file: str, data: bytes) -> dict[str, Any]:
    with reading(file, "a batch of CIFAR"):
        # The unpickler allocates as many entries as the highest memo number: a few bytes can ask
        # for all memory.
        if any(
            opcode.name.endswith("PUT") and int(argument or 0) > len(data)
            for opcode, argument, _ in pickletools.genops(data)
        ):
            raise ValueError("it numbers more objects than it has bytes")
        content = _NumbersOnly(io.BytesIO(data), encoding="latin1").load()
        if not isinstance(content, dict):
            raise ValueError(f"it contains a {type(content).__name__}, expected a dictionary")
    return content
