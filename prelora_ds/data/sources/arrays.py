"""Pixels without a format around them: MNIST's idx files and CIFAR's batches. They become PNGs."""

from __future__ import annotations

import io
import pickle
import re
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prelora_ds.data.images import encode
from prelora_ds.data.sources.listing import Listing, Request, broken, choose_split, items, read_whole

IDX, CIFAR = "idx", "cifar"
_IDX_NAME = re.compile(r"(?P<split>.*?)[-_.]?(?P<what>images|labels)[-.]idx(?P<axes>[13])-ubyte(\.gz)?")
_CIFAR_SPLITS = {
    "train": re.compile(r"(data_batch_\d+|train)(\.bin)?"), "test": re.compile(r"(test_batch|test)(\.bin)?"),
}


def detect_idx(source: Path) -> bool:
    return source.is_dir() and any(_IDX_NAME.fullmatch(path.name) for path in source.iterdir())


def find_idx(request: Request) -> Listing:
    """MNIST-style pairs of files, ``train-images-idx3-ubyte[.gz]`` and so on; ``t10k`` is the split ``test``.

    Raises ConfigError for a file whose header tells another size, and for images and labels that are not as many.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(request.source.iterdir()):
        if match := _IDX_NAME.fullmatch(path.name):
            found.setdefault(match["split"].replace("t10k", "test") or "all", {})[match["what"]] = path
    split = choose_split(list(found), request)
    if found[split].keys() != {"images", "labels"}:
        raise broken(request.source, f"split {split} has the {' and '.join(found[split])} alone")
    images, labels = idx_array(str(found[split]["images"])), idx_array(str(found[split]["labels"]))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise broken(found[split]["images"], f"images of shape {images.shape}, labels of shape {labels.shape}")
    return Listing(IDX, None, (str(found[split]["images"]),), items(0, labels, range(len(labels)), 1))


def read_idx(file: str, row: int, _: int) -> bytes:
    return encode(Image.fromarray(_kept_idx(file)[row]), "PNG")


def idx_array(file: str) -> NDArray[np.uint8]:
    """Raises ConfigError unless the file is whole, and of bytes."""
    data = read_whole(Path(file))
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise broken(file, "no idx file of bytes")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape))
    if body.size != np.prod(shape, dtype=np.int64):
        raise broken(file, f"{body.size} bytes of {shape}: cut short, or more than one array")
    return body.reshape(shape)


_kept_idx = lru_cache(maxsize=2)(idx_array)


def detect_cifar(source: Path) -> bool:
    return source.is_dir() and bool(_cifar_files(source))


def _cifar_files(source: Path) -> dict[str, list[Path]]:
    files = [path for path in sorted(source.iterdir()) if path.is_file()] if source.is_dir() else []
    found = {split: [path for path in files if name.fullmatch(path.name)] for split, name in _CIFAR_SPLITS.items()}
    return {split: paths for split, paths in found.items() if paths}


def find_cifar(request: Request) -> Listing:
    """CIFAR-10 and -100 (fine labels), the folders of the python and of the binary version.

    The python version is pickled. Its files are read by an unpickler that can make arrays of numbers and containers,
    and nothing else; the binary version has no such doubt. Raises ConfigError for both kinds of damage.
    """
    found = _cifar_files(request.source)
    files = found[choose_split(list(found), request)]
    rows = []
    for number, path in enumerate(files):
        labels = cifar_batch(str(path))[1]
        rows.append(items(number, labels, range(len(labels)), 1))
    return Listing(CIFAR, _cifar_classes(request.source), tuple(map(str, files)), np.concatenate(rows))


def read_cifar(file: str, row: int, _: int) -> bytes:
    return encode(Image.fromarray(_kept_cifar(file)[0][row].reshape(3, 32, 32).transpose(1, 2, 0)), "PNG")


def cifar_batch(file: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(pixels uint8 [N, 3072], labels int64 [N])."""
    data = read_whole(Path(file))
    if file.endswith(".bin"):
        extra = 2 if Path(file).name in ("train.bin", "test.bin") else 1  # CIFAR-100 has the coarse label first
        if not data or len(data) % (3072 + extra):
            raise broken(file, f"{len(data)} bytes are no whole number of records of {3072 + extra}")
        table = np.frombuffer(data, np.uint8).reshape(-1, 3072 + extra)
        return table[:, extra:], table[:, extra - 1].astype(np.int64)
    content = _unpickle(file, data)
    try:
        labels = content["fine_labels"] if "fine_labels" in content else content["labels"]
        pixels, numbers = np.asarray(content["data"]), np.asarray(labels, np.int64)
        if pixels.dtype != np.uint8 or pixels.shape != (len(numbers), 3072):
            raise ValueError(f"{pixels.dtype} pixels of shape {pixels.shape} for {len(numbers)} labels")
    except (KeyError, ValueError, TypeError) as error:
        raise broken(file, f"no batch of CIFAR ({type(error).__name__}: {error})") from error
    return pixels, numbers


_kept_cifar = lru_cache(maxsize=6)(cifar_batch)  # all batches of CIFAR-10


def _cifar_classes(folder: Path) -> tuple[str, ...]:
    for name in ("batches.meta.txt", "fine_label_names.txt"):
        if (folder / name).is_file():
            return tuple((folder / name).read_text().split())
    for name in ("batches.meta", "meta"):
        if (folder / name).is_file():
            content = _unpickle(str(folder / name), (folder / name).read_bytes())
            for key in ("label_names", "fine_label_names"):
                if isinstance(content.get(key), list):
                    return tuple(map(str, content[key]))
    raise broken(folder, "lacks the file with the names of the classes (batches.meta, meta, or the .txt beside .bin)")


class _NumbersOnly(pickle.Unpickler):
    # numpy._core is where NumPy 2 keeps what older files call numpy.core.
    _ALLOWED = {(module, name) for module in ("numpy.core.multiarray", "numpy._core.multiarray")
                for name in ("_reconstruct",)} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickle(file: str, data: bytes) -> dict[str, Any]:
    try:
        content = _NumbersOnly(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises anything
        raise broken(file, f"no batch of CIFAR ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise broken(file, f"no batch of CIFAR (a {type(content).__name__})")
    return content
