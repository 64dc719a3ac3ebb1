"""A Hugging Face image data set on disk: a folder of `save_to_disk` (Arrow), or one of Parquet files."""

from __future__ import annotations

import json
import re
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prelora_ds.core.errors import ConfigError
from prelora_ds.data.sources.listing import Listing, Request, broken, choose_split, items, read_range

KIND = "huggingface"
_PARQUET = re.compile(r"(?P<split>.+?)(-\d+-of-\d+(-[0-9a-f]+)?)?\.parquet")


def detect(source: Path) -> bool:
    return source.is_dir() and (any((source / name).is_file() for name in ("dataset_dict.json", "state.json"))
                                or any(source.rglob("*.parquet")))


def find(request: Request) -> Listing:
    """The images of a split: a column of type Image, and the label out of a ClassLabel, or of whole numbers.

    Needs pyarrow. Raises ConfigError for other columns, and for a file that is damaged.
    """
    _arrow()
    files = _files(request)
    try:
        rows, features = [], None
        for number, file in enumerate(files):
            found, labels, blocks = _labels(file)
            if features not in (None, found):
                raise ValueError("its columns are not those of the files before it")
            features = found
            if None in labels:
                raise ValueError(f"row {labels.index(None)} has no label")
            rows.append(items(number, labels, range(len(labels)), 1, blocks))
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError) as error:  # Arrow's own errors are OSErrors and ValueErrors
        raise broken(file, f"cannot be read ({error})") from error
    if features is None:
        raise broken(request.source, "holds no data files")
    return Listing(KIND, features, tuple(map(str, files)), np.concatenate(rows))


def read(file: str, row: int, _: int) -> bytes:
    """Raises ValueError for a row without an image."""
    column, row = (_arrow_column(file), row) if file.endswith(".arrow") else _parquet_column(file, row)
    image = column[row].as_py()
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise ValueError("no image in this row")
    if image["bytes"] is not None:
        return bytes(image["bytes"])
    return read_range(str(Path(file).parent / image["path"]), 0, -1)


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("SOURCE", "huggingface", "needs pyarrow", "pip install 'prelora_ds[data]'") from error
    return pyarrow


def _files(request: Request) -> list[Path]:
    folder = request.source
    if (folder / "dataset_dict.json").is_file():
        folder = folder / choose_split(json.loads((folder / "dataset_dict.json").read_text())["splits"], request)
    elif (folder / "state.json").is_file() and request.split is not None:
        choose_split([str(json.loads((folder / "state.json").read_text()).get("_split"))], request)
    if (folder / "state.json").is_file():
        return [folder / part["filename"] for part in json.loads((folder / "state.json").read_text())["_data_files"]]
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        match = _PARQUET.fullmatch(path.name)
        splits.setdefault(match["split"] if match and match[2] else path.parent.name if path.parent != folder
                          else path.stem, []).append(path)
    return splits[choose_split(list(splits), request)]


def _labels(file: Path) -> tuple[tuple[str, ...] | None, list[int | None], NDArray[np.int64]]:
    """(class names, labels, number of the part that is read at once) of a file's rows."""
    pa = _arrow()
    if file.suffix == ".arrow":
        table = _table(str(file))
        features, blocks = _features(table.schema.metadata), np.zeros(1, np.int64)
        _, label = _columns(features, table.schema.names)
        column = table[label]
    else:
        parquet = pa.parquet.ParquetFile(file)
        features = _features(parquet.schema_arrow.metadata)
        _, label = _columns(features, parquet.schema_arrow.names)
        column = parquet.read([label])[label]
        counts = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        blocks = np.repeat(np.arange(len(counts)), counts)
    names = features.get(label, {}).get("names")
    return tuple(names) if names else None, column.to_pylist(), blocks


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    text = (metadata or {}).get(b"huggingface")
    found: dict[str, Any] = json.loads(text)["info"]["features"] if text else {}
    return found


def _columns(features: dict[str, Any], names: list[str]) -> tuple[str, str]:
    """(image, label): by type where the file tells it, else by name."""
    images = [name for name, what in features.items() if isinstance(what, dict) and what.get("_type") == "Image"]
    labels = [name for name, what in features.items() if isinstance(what, dict) and what.get("_type") == "ClassLabel"]
    images = images or [name for name in ("image", "img") if name in names]
    labels = labels or [name for name in ("label", "fine_label") if name in names]
    labels = next(([name] for name in ("label", "fine_label") if name in labels), labels)
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(f"columns {names}: one image and one label are wanted, found {images} and {labels}")
    return images[0], labels[0]


@cache
def _table(file: str) -> Any:
    pa = _arrow()
    return pa.ipc.open_stream(pa.memory_map(file)).read_all()  # mapped: no bytes are read here


@cache
def _arrow_column(file: str) -> Any:
    table = _table(file)
    return table[_columns(_features(table.schema.metadata), table.schema.names)[0]]


@lru_cache(maxsize=64)
def _parquet_file(file: str) -> tuple[Any, str, list[int]]:
    parquet = _arrow().parquet.ParquetFile(file)
    image = _columns(_features(parquet.schema_arrow.metadata), parquet.schema_arrow.names)[0]
    counts = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    return parquet, image, [0, *accumulate(counts)]


def _parquet_column(file: str, row: int) -> tuple[Any, int]:
    starts = _parquet_file(file)[2]
    group = int(np.searchsorted(starts, row, side="right")) - 1
    return _group(file, group), row - starts[group]


@lru_cache(maxsize=20)  # rows are shuffled within windows of 16 of these
def _group(file: str, group: int) -> Any:
    parquet, image, _ = _parquet_file(file)
    return parquet.read_row_group(group, [image])[image]
