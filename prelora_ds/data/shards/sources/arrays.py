"""Pixels without a format around them: MNIST's idx files and CIFAR's batches. They become PNGs."""

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
    """MNIST-style pairs of files, ``train-images-idx3-ubyte[.gz]`` and so on; ``t10k`` is the split ``test``.

    Raises ConfigError for a file whose header tells another size, and for images and labels that are not as many.
    """
    found: dict[str, dict[str, Path]] = {}
    skipped = []
    for path, match in _idx_files(request.source):
        of_split = found.setdefault(match["split"].replace("t10k", "test") or "all", {})
        kept = of_split.setdefault(match["what"], path)
        if kept != path:  # sorted: the plain file comes before the packed one
            skipped.append(f"{path.name} in favour of {kept.name}")
    split = choose_split(list(found), request)
    if found[split].keys() != {"images", "labels"}:
        raise broken(
            request.source,
            f"split {split} has only the {' and '.join(found[split])}",
            "fetch the missing file",
        )
    images, labels = idx_array(str(found[split]["images"])), idx_array(str(found[split]["labels"]))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise broken(
            found[split]["images"],
            f"images of shape {images.shape}, labels of shape {labels.shape}",
        )
    rows = items(0, labels, range(len(labels)), 1)
    return Listing(IDX, None, (str(found[split]["images"]),), rows, ", ".join(skipped))


def read_idx(file: str, row: int, _: int) -> bytes:
    return encode(Image.fromarray(_kept_idx(file, version(file))[row]), "PNG")


def idx_array(file: str) -> NDArray[np.uint8]:
    """Raises ConfigError unless the file is whole, and of bytes."""
    data = read_whole(Path(file))
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise broken(file, "is not an idx file of bytes")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape))
    if body.size != math.prod(shape):
        raise broken(file, f"{body.size} bytes of {shape}: cut short, or more than one array")
    return body.reshape(shape)


@lru_cache(maxsize=2)
def _kept_idx(file: str, _: tuple[int, int, int]) -> NDArray[np.uint8]:
    return idx_array(file)


def detect_cifar(source: Path) -> Path | None:
    """Raises OSError for a file that cannot be read."""
    files = (path for paths in _cifar_files(source).values() for path in paths)
    return next((path for path in files if _looks_like_a_batch(path)), None)


def _looks_like_a_batch(path: Path) -> bool:
    """By the name where no other data set has such a name, otherwise by the content: CIFAR-100's
    ``train`` and ``test`` may as well be lists of files."""
    if path.name not in _COMMON_NAMES:
        return True
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO


def _cifar_files(source: Path) -> dict[str, list[Path]]:
    files = [path for path in sorted(source.iterdir()) if path.is_file()] if source.is_dir() else []
    found = {
        split: [path for path in files if name.fullmatch(path.name)]
        for split, name in _CIFAR_SPLITS.items()
    }
    return {split: paths for split, paths in found.items() if paths}


def find_cifar(request: Request) -> Listing:
    """CIFAR-10 and -100 (fine labels), the folders of the python and of the binary version.

    The python version is pickled. Its files are read by an unpickler that can make arrays of numbers and containers,
    and nothing else; the binary version has no such doubt. Raises ConfigError for both kinds of damage.
    """
    found = _cifar_files(request.source)
    split = choose_split(list(found), request)
    files = found[split]
    rows = []
    for number, path in enumerate(files):
        labels = cifar_batch(str(path))[1]
        rows.append(items(number, labels, range(len(labels)), 1))
    _check_files(request.source, split, files)
    return Listing(
        CIFAR, _cifar_classes(request.source), tuple(map(str, files)), np.concatenate(rows)
    )


def _check_files(source: Path, split: str, files: list[Path]) -> None:
    """Raises ConfigError for a batch that is missing, and where both versions are in one folder."""
    if len({path.suffix for path in files}) > 1:
        raise broken(
            source,
            f"holds the python and the binary version of the split {split}",
            "leave one of the two in the folder",
        )
    names = [_CIFAR_SPLITS["train"].fullmatch(path.name) for path in files]
    parts = [int(name["part"]) for name in names if name and name["part"]]
    if parts and len(parts) < len(files):
        raise broken(source, "holds CIFAR-10 and CIFAR-100", "give each a folder of its own")
    if parts:
        check_parts(source, "CIFAR-10's data_batch", parts, _CIFAR_10_PARTS)


def read_cifar(file: str, row: int, _: int) -> bytes:
    pixels = _kept_cifar(file, version(file))[0][row]
    return encode(Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)), "PNG")


def cifar_batch(file: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(pixels uint8 [N, 3072], labels int64 [N])."""
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
        # No array is made of nested lists: a small pickle can nest the same list until it has more
        # than fits.
        if (
            not isinstance(pixels, np.ndarray)
            or not isinstance(labels, list)
            or not all(isinstance(label, int) for label in labels)
        ):
            raise ValueError("its data are not an array, or its labels not a list of whole numbers")
        numbers = np.asarray(labels, np.int64)
        if pixels.dtype != np.uint8 or pixels.shape != (len(numbers), 3072):
            raise ValueError(
                f"{pixels.dtype} pixels of shape {pixels.shape} for {len(numbers)} labels"
            )
    return pixels, numbers


@lru_cache(maxsize=6)  # all batches of CIFAR-10
def _kept_cifar(file: str, _: tuple[int, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
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
    # numpy._core is where NumPy 2 keeps what older files call numpy.core.
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
        # The unpickler clears as many places as the highest number of a memo: a few bytes can ask
        # for all memory.
        if any(
            opcode.name.endswith("PUT") and int(argument or 0) > len(data)
            for opcode, argument, _ in pickletools.genops(data)
        ):
            raise ValueError("it numbers more objects than it has bytes")
        content = _NumbersOnly(io.BytesIO(data), encoding="latin1").load()
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} and not a dictionary")
    return content
