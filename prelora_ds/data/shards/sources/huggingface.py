"""A Hugging Face image data set on disk.

It is a folder written by `save_to_disk` (Arrow), or a folder of Parquet files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prelora_ds.data.shards.reading import broken, read_range, read_text, reading, version
from prelora_ds.data.shards.sources.listing import (
    SPLITS,
    Listing,
    Request,
    check_parts,
    choose_split,
    hidden,
    items,
    some,
)
from prelora_ds.errors import ConfigError

FORMAT = "huggingface"
_END = b"\xff\xff\xff\xff\0\0\0\0"  # the last bytes of an Arrow stream
_NUMBERED = re.compile(r"(?P<split>.+?)-(?P<part>\d+)-of-(?P<parts>\d+)(-[0-9a-f]+)?")


def detect(source: Path) -> Path | None:
    if not source.is_dir():
        return None
    states = (source / name for name in ("dataset_dict.json", "state.json"))
    state = next((state for state in states if state.is_file()), None)
    return state or next(_parquets(source), None)


def find(request: Request) -> Listing:
    """List the images of a split.

    Images are in a column of type Image or of bytes, labels in one of type ClassLabel or of
    integers. This needs pyarrow. Raises ConfigError for other columns, for a missing or damaged
    file, and for several configurations of the data set in one folder.
    """
    _arrow()
    files = _files(request)
    if not files:
        raise broken(request.source, "contains no data files")
    rows, classes = [], []
    for number, file in enumerate(files):
        with reading(file, "an Arrow or Parquet file"):
            names, labels, blocks = _labels(file)
            if None in labels:
                raise ValueError(f"row {labels.index(None)} has no label")
            rows.append(items(number, labels, range(len(labels)), 1, blocks))
        classes.append(names)
        if names != classes[0]:
            raise broken(
                file,
                f"its classes differ from those of {files[0]}",
                "name a folder of one data set",
            )
    return Listing(FORMAT, classes[0], tuple(map(str, files)), np.concatenate(rows))


def read(file: str, row: int, _: int) -> bytes:
    """Return the bytes of the image in a row. Raises ValueError for a row without an image."""
    column, row = (
        (_arrow_column(file), row) if file.endswith(".arrow") else _parquet_column(file, row)
    )
    image = column[row].as_py()
    if isinstance(image, bytes):
        return image
    image = image or {}
    if image.get("bytes") is not None:
        return bytes(image["bytes"])
    if image.get("path") is None:
        raise ValueError("no image in this row")
    return read_range(str(Path(file).parent / image["path"]), 0, -1)


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "SOURCE", "huggingface", "needs pyarrow", "pip install '.[data]'"
        ) from error
    return pyarrow


def _files(request: Request) -> list[Path]:
    folder = request.source
    if (folder / "dataset_dict.json").is_file():
        folder = folder / choose_split(_json(folder / "dataset_dict.json", "splits"), request)
        if not (folder / "state.json").is_file():
            raise broken(
                folder,
                "contains no state.json, and dataset_dict.json names this split",
                "fetch the missing files",
            )
    elif (folder / "state.json").is_file() and request.split is not None:
        choose_split([str(_json(folder / "state.json", "_split"))], request)
    if (folder / "state.json").is_file():
        with reading(folder / "state.json", "the state of a data set"):
            return [
                folder / part["filename"] for part in _json(folder / "state.json", "_data_files")
            ]
    return _parquet_files(folder, request)


def _json(path: Path, key: str) -> Any:
    with reading(path, "JSON"):
        content = json.loads(read_text(path))
        if not isinstance(content, dict) or key not in content:
            raise ValueError(f"it has no {key!r}")
        return content[key]


def _parquets(folder: Path) -> Iterator[Path]:
    return (
        path
        for path in folder.rglob("*.parquet")
        if not any(map(hidden, path.relative_to(folder).parts)) and path.is_file()
    )


class _Part(NamedTuple):
    """A Parquet file: its configuration (a folder), its split, and its number if it has one."""

    config: Path
    split: str
    path: Path
    part: int | None = None
    parts: int | None = None


def _part(path: Path, top: Path) -> _Part:
    """Parse the path of a Parquet file.

    It is ``CONFIG/train-00000-of-00002``, ``CONFIG/train``, ``CONFIG/train/0000`` or
    ``CONFIG/train/ANY``.
    """
    folder, stem = path.parent, path.stem
    above = folder.parent if folder != top else top
    if match := _NUMBERED.fullmatch(stem):
        return _Part(folder, match["split"], path, int(match["part"]), int(match["parts"]))
    if stem.isascii() and stem.isdigit():
        return _Part(above, folder.name, path, int(stem))
    if (split := stem.rstrip("0123456789").rstrip("-_.")).lower() in SPLITS:
        return _Part(folder, split, path)
    if folder.name.lower() in SPLITS:
        return _Part(above, folder.name, path)
    return _Part(folder, stem, path)


def _parquet_files(folder: Path, request: Request) -> list[Path]:
    """Return the files of the requested split.

    Raises ConfigError if several configurations have this split, or if a part is missing.
    """
    parts = sorted((_part(path, folder) for path in _parquets(folder)), key=lambda part: part.path)
    split = choose_split(sorted({part.split for part in parts}), request)
    parts = [part for part in parts if part.split == split]
    if len(configs := sorted({part.config for part in parts})) > 1:
        raise broken(
            folder,
            f"the split {split} exists {len(configs)} times, in the folders "
            f"{some([str(config.relative_to(folder)) for config in configs])}",
            f"name the folder of one of them as SOURCE, for example {configs[-1]}",
        )
    if len(totals := {part.parts for part in parts}) > 1:
        raise broken(
            folder,
            f"the files of the split {split} do not agree on how many there are: "
            f"{some([part.path.name for part in parts])}",
            "remove the files of another version",
        )
    numbers = [part.part for part in parts if part.part is not None]
    if total := totals.pop():
        check_parts(folder, f"the split {split}", numbers, range(total))
    elif numbers:
        check_parts(
            folder, f"the split {split}", numbers, range(min(*numbers, 1), max(numbers) + 1)
        )
    return [part.path for part in parts]


def _labels(file: Path) -> tuple[tuple[str, ...] | None, list[int | None], NDArray[np.int64]]:
    """Return (class names, labels, blocks) of a file; the last two have one entry per row.

    A block is the number of the part that is read at once.
    """
    pa = _arrow()
    if file.suffix == ".arrow":
        table = _table(str(file), version(file))
        schema, blocks = table.schema, np.zeros(1, np.int64)
    else:
        parquet = pa.parquet.ParquetFile(file)
        schema = parquet.schema_arrow
        counts = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        blocks = np.repeat(np.arange(len(counts)), counts)
    features = _features(schema.metadata)
    image, label = _columns(features, schema.names)
    if not _holds_images(pa, kind := schema.field(image).type):
        raise broken(
            file,
            f"the column {image!r} has the type {kind}, expected bytes or Hugging Face's "
            "type Image",
            "write the bytes of the images into the column",
        )
    if not pa.types.is_integer(kind := schema.field(label).type):
        raise broken(
            file,
            f"the column {label!r} has the type {kind}, expected a ClassLabel or integers",
            "cast the column, for example with class_encode_column",
        )
    column = table[label] if file.suffix == ".arrow" else parquet.read([label])[label]
    feature = features.get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    if names and not isinstance(names, list):
        raise broken(
            file,
            f"the ClassLabel {label!r} has the names {names!r}, which are not a list",
            "write the names as a list, in the order of the labels",
        )
    return tuple(map(str, names)) if names else None, column.to_pylist(), blocks


def _holds_images(pa: Any, kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return bool({field.name for field in kind} & {"bytes", "path"})
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """Return the types of the columns from Hugging Face's metadata, as far as there are any.

    Raises ValueError if they cannot be parsed.
    """
    text = (metadata or {}).get(b"huggingface")
    if not text:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"its Hugging Face metadata has no info.features ({error!r:.80})"
        ) from error
    if not isinstance(features, dict):
        raise ValueError(
            f"info.features of its Hugging Face metadata is not a mapping: {features!r:.60}"
        )
    return features


def _columns(features: dict[str, Any], names: list[str]) -> tuple[str, str]:
    """Return the names of the (image, label) columns: by type if known, otherwise by name."""
    images = [
        name
        for name, what in features.items()
        if isinstance(what, dict) and what.get("_type") == "Image"
    ]
    labels = [
        name
        for name, what in features.items()
        if isinstance(what, dict) and what.get("_type") == "ClassLabel"
    ]
    if missing := [name for name in (*images, *labels) if name not in names]:
        raise ValueError(
            f"its metadata names a column {missing[0]!r}, and it has the columns {some(names)}"
        )
    images = images or [name for name in ("image", "img") if name in names]
    labels = labels or [name for name in ("label", "fine_label") if name in names]
    labels = next(([name] for name in ("label", "fine_label") if name in labels), labels)
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"expected one image and one label column, found {images} and {labels} among {names}"
        )
    return images[0], labels[0]


@lru_cache(maxsize=1024)  # these are mapped and not read: all files of a data set stay open
def _table(file: str, _: tuple[int, int, int]) -> Any:
    pa = _arrow()
    mapped = pa.memory_map(file)
    table = pa.ipc.open_stream(mapped).read_all()
    # Arrow treats the end of a file as the end of its rows.
    if mapped.size() < len(_END) or mapped.read_at(len(_END), mapped.size() - len(_END)) != _END:
        raise ValueError("the end of the rows is missing: the file is cut short")
    table.validate(full=True)
    return table


def _arrow_column(file: str) -> Any:
    table = _table(file, version(file))
    return table[_columns(_features(table.schema.metadata), table.schema.names)[0]]


@lru_cache(maxsize=64)
def _parquet_file(file: str, _: tuple[int, int, int]) -> tuple[Any, str, list[int]]:
    parquet = _arrow().parquet.ParquetFile(file)
    image = _columns(_features(parquet.schema_arrow.metadata), parquet.schema_arrow.names)[0]
    counts = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    return parquet, image, [0, *accumulate(counts)]


def _parquet_column(file: str, row: int) -> tuple[Any, int]:
    file_version = version(file)
    starts = _parquet_file(file, file_version)[2]
    group = int(np.searchsorted(starts, row, side="right")) - 1
    return _group(file, file_version, group), row - starts[group]


@lru_cache(maxsize=20)  # rows are shuffled within windows of 16 of these
def _group(file: str, file_version: tuple[int, int, int], group: int) -> Any:
    parquet, image, _ = _parquet_file(file, file_version)
    return parquet.read_row_group(group, [image])[image]
