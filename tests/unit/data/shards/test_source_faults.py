"""A damaged, hostile or endless source of any kind is one message."""

from __future__ import annotations

import os
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from support.sources import (
    IMAGES,
    LABELS,
    WNIDS,
    cifar,
    idx,
    kaggle,
    parquet,
    picture,
    refusal,
    table,
    tar,
)

from prelora_ds.data.shards.build_plan import Options
from prelora_ds.data.shards.build_shards import build
from prelora_ds.data.shards.sources.listing import Request
from prelora_ds.errors import ConfigError


def sources(root):
    """(source, a file of it) of every kind."""
    for name in ("test_batch", "test_batch.bin"):
        yield cifar(root / f"cifar-{name}", [name]), root / f"cifar-{name}" / name
    yield root / "cifar-test_batch", root / "cifar-test_batch" / "batches.meta"
    (root / "idx").mkdir()
    idx(root / "idx", "train-images-idx3-ubyte.gz", IMAGES)
    idx(root / "idx", "train-labels-idx1-ubyte", LABELS)
    for path in sorted((root / "idx").iterdir()):
        yield root / "idx", path
    yield root / "parquet", parquet(root / "parquet" / "train.parquet")
    arrow = root / "arrow" / "data.arrow"
    arrow.parent.mkdir()
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)
    (arrow.parent / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    yield arrow.parent, arrow
    yield arrow.parent, arrow.parent / "state.json"
    inner = tar(root / "inner.tar", [(f"{WNIDS[0]}_1.JPEG", picture(1))]).read_bytes()
    yield root / "train.tar", tar(root / "train.tar", [(f"{WNIDS[0]}.tar", inner)])
    yield kaggle(root / "kaggle"), root / "kaggle" / "LOC_val_solution.csv"


def mutated(data, rng):
    """``data`` cut short, with other bytes, with other bits near the begin, or with a part gone."""
    data, way = bytearray(data), rng.integers(0, 4)
    first, last = sorted(int(place) for place in rng.integers(0, len(data), 2))
    if way == 0:
        return data[:last]
    if way == 1:
        data[first], data[last] = (int(byte) for byte in rng.integers(0, 256, 2))
    elif way == 2:
        data[first % 600] ^= 1 << int(rng.integers(0, 8))
    else:
        del data[first:last]
    return data


def test_every_mutation_of_every_source_is_built_or_one_message(tmp_path):
    """Each image that is left is decoded, and the shards are read again."""
    rng, options, ends = np.random.default_rng(0), Options(samples_per_shard=64), Counter()
    for source, path in sources(tmp_path):
        data = path.read_bytes()
        for number in range(40):
            path.write_bytes(mutated(data, rng))
            out = tmp_path / f"out-{number}"
            try:
                ends[len(build(Request(source), out, options)) > 0] += 1
            except ConfigError as error:
                ends["refused"] += 1
                assert str(tmp_path) in str(error) and "object at 0x" not in str(error)
            for left in (out, out.with_name(f"{out.name}.partial")):
                shutil.rmtree(left, ignore_errors=True)
        path.write_bytes(data)
    assert ends[True] > 50 and ends["refused"] > 50 and not ends[False]


@pytest.mark.timeout(20)
def test_pipes_and_devices_are_not_sources(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", type(tmp_path)("/dev/zero")):
        for kind in (None, "ilsvrc2012", "imagefolder"):
            assert len(refusal(path, kind=kind).splitlines()) == 2


def test_a_link_in_a_circle_is_not_a_source(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert "SOURCE" in refusal(tmp_path / "loop")
