"""Small data sets in their original formats, and what `find_images` returns for them."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from prelora_ds.data.shards.sources import SOURCE_FORMATS, find_images
from prelora_ds.data.shards.sources.listing import Request
from prelora_ds.errors import ConfigError


def picture(number, form="JPEG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def refusal(source, split=None, labels=None, kind=None):
    with pytest.raises(ConfigError) as refused:
        find_images(Request(source, split, labels), kind)
    return str(refused.value)


def found(source, split=None, labels=None):
    """Return (classes, [(bytes, label)], skipped names)."""
    listing = find_images(Request(source, split, labels))
    places = [(listing.files[i["file"]], int(i["offset"]), int(i["length"])) for i in listing.items]
    images = [SOURCE_FORMATS[listing.source_format].read(*place) for place in places]
    return (
        listing.classes,
        list(zip(images, listing.items["label"].tolist(), strict=True)),
        listing.skipped,
    )


def tar(path, members):
    with tarfile.open(path, "w") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


WNIDS = ("n01440764", "n02099601", "n03888257")
VAL = {f"ILSVRC2012_val_{number:08d}": picture(number) for number in range(1, 5)}
TRUTH = dict(zip(VAL, (2, 0, 1, 0), strict=True))
TABLE = "ImageId,PredictionString\n" + "".join(
    f"{name},{WNIDS[label]} 1 2 3 4 {WNIDS[label]} 5 6 7 8\n"
    for name, label in reversed(TRUTH.items())
)
EXPECTED = [(data, TRUTH[name]) for name, data in VAL.items()]


def kaggle(root):
    """Write Kaggle's tree, and return its folder of val images."""
    val = root / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    val.mkdir(parents=True)
    for name, data in VAL.items():
        (val / f"{name}.JPEG").write_bytes(data)
    (root / "LOC_val_solution.csv").write_text(TABLE)
    return val


def cifar(folder, batches, names=("cat", "dog")):
    folder.mkdir(exist_ok=True)
    for name in batches:
        pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
        record = np.concatenate([np.array([[0], [1]], np.uint8), pixels], axis=1)
        (folder / name).write_bytes(
            record.tobytes()
            if name.endswith(".bin")
            else pickle.dumps({"labels": [0, 1], "data": pixels})
        )
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(names)}))
    return folder


def idx(folder, name, array):
    data = (
        b"\0\0\x08"
        + bytes([array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


IMAGES, LABELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.array([1, 0], np.uint8)


def table(count=4, labels=None, names=("a", "b"), image=None, metadata=None):
    labels = [number % 2 for number in range(count)] if labels is None else labels
    image = (
        [{"bytes": picture(number), "path": None} for number in range(count)]
        if image is None
        else image
    )
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    text = json.dumps({"info": {"features": features}}) if metadata is None else metadata
    made = pa.table({"image": image, "label": labels})
    return made.replace_schema_metadata({"huggingface": text}) if text else made


def parquet(path, *arguments, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(table(*arguments, **settings), path)
    return path
