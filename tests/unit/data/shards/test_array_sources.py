"""CIFAR and idx with a part missing, damaged or hostile: one message with the file."""

from __future__ import annotations

import gzip
import os
import pickle
import struct

import numpy as np
import pytest
from support.sources import IMAGES, LABELS, cifar, found, idx, picture, refusal

from prelora_ds.data.shards import reading
from prelora_ds.data.shards.sources import find_images
from prelora_ds.data.shards.sources.listing import Request
from prelora_ds.errors import ConfigError


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_missing_batches_of_cifar_are_named(tmp_path, suffix):
    folder = cifar(tmp_path, [f"data_batch_{number}{suffix}" for number in (1, 2, 5)])
    assert "2 of the 5 parts of CIFAR-10's data_batch are missing: number 3, 4" in refusal(folder)
    cifar(tmp_path, [f"data_batch_{number}{suffix}" for number in (3, 4)])
    assert len(found(folder)[1]) == 10
    cifar(tmp_path, [f"data_batch_{number}{suffix}" for number in (6,)])
    assert "part 6" in refusal(folder)


def test_both_versions_of_cifar_in_one_folder_are_refused(tmp_path):
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    folder = cifar(tmp_path, [*batches, *(f"{name}.bin" for name in batches)])
    assert "the python and the binary version" in refusal(folder)


def nested():
    """A list of two times the list before, 60 levels deep: nothing has memory for its copy."""
    inner = [0]
    for _ in range(60):
        inner = [inner, inner]
    return inner


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "content",
    [
        {"labels": [0, 1], "data": nested()},
        {"labels": nested(), "data": np.zeros((2, 3072), np.uint8)},
        {"labels": [0.5, 1], "data": np.zeros((2, 3072), np.uint8)},
        {"data": 1},
        [1],
        {"labels": [0], "data": None},
        {"labels": [1 << 70, 0], "data": np.zeros((2, 3072), np.uint8)},
    ],
)
def test_a_pickle_of_something_else_is_one_message(tmp_path, content):
    cifar(tmp_path, ["test_batch"])
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content))
    assert "cannot be read as a batch of CIFAR" in refusal(tmp_path)


@pytest.mark.timeout(30)
def test_a_pickle_that_asks_for_all_memory_is_one_message(tmp_path):
    cifar(tmp_path, ["test_batch"])
    put = b"r" + struct.pack("<I", (1 << 32) - 1)  # LONG_BINPUT
    (tmp_path / "test_batch").write_bytes(b"\x80\x02}" + put + b".")
    assert "numbers more objects than it has bytes" in refusal(tmp_path)
    (tmp_path / "test_batch").write_bytes(
        pickle.dumps({"labels": [0], "data": np.zeros((1, 3072), np.uint8)})
    )
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": nested()}))
    assert "lacks the names of the classes" in refusal(tmp_path)


def test_packed_idx_files_next_to_the_plain_ones_are_skipped_and_reported(tmp_path):
    for suffix in ("", ".gz"):
        idx(tmp_path, f"train-images-idx3-ubyte{suffix}", IMAGES)
        idx(tmp_path, f"train-labels-idx1-ubyte{suffix}", LABELS)
    (tmp_path / "._train-images-idx3-ubyte").write_bytes(b"\0\5\x16\7")
    assert "train-images-idx3-ubyte.gz in favour of train-images-idx3-ubyte" in found(tmp_path)[2]


def test_every_flipped_byte_of_a_packed_idx_file_is_reported_or_harmless(tmp_path):
    idx(tmp_path, "train-images-idx3-ubyte.gz", IMAGES)
    idx(tmp_path, "train-labels-idx1-ubyte", LABELS)
    path, whole = tmp_path / "train-images-idx3-ubyte.gz", found(tmp_path)[1]
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            find_images(Request(tmp_path))
        except ConfigError as error:
            assert str(path) in str(error)
    assert len(whole) == 2


def test_a_small_file_that_unpacks_to_an_immense_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_UNPACKED_BYTES", 1 << 20)
    idx(tmp_path, "train-labels-idx1-ubyte", LABELS)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(1 << 22)))
    assert "more than 1,048,576 bytes when it is unpacked" in refusal(tmp_path)


@pytest.mark.timeout(20)
def test_a_header_of_immense_sides_and_a_pipe_are_one_message(tmp_path):
    idx(tmp_path, "train-labels-idx1-ubyte", LABELS)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(b"\0\0\x08\x03" + struct.pack(">3I", *[(1 << 32) - 1] * 3))
    assert "do not match the shape" in refusal(tmp_path)
    path.write_bytes(b"\0\0\x08\xff" + bytes(4 * 255))
    refusal(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert "pipe or a device" in refusal(tmp_path)


def test_a_folder_with_the_name_of_an_idx_file_is_skipped(tmp_path):
    """Kaggle's MNIST has both: the files, and folders with their copies."""
    for name, array in (("images.idx3", np.arange(24, dtype=np.uint8).reshape(2, 3, 4)),
                        ("labels.idx1", LABELS)):
        copy = tmp_path / f"train-{name}-ubyte".replace(".", "-")
        copy.mkdir()
        idx(copy, copy.name, array)
        idx(tmp_path, f"train-{name}-ubyte", array)
    assert [label for _, label in found(tmp_path)[1]] == LABELS.tolist()


def test_a_list_of_files_called_train_does_not_make_a_tree_of_classes_cifar(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(picture(1))
    for split in ("train", "test"):
        (tmp_path / split).write_text("cat/1.jpg 0\n")
    assert found(tmp_path)[0] == ("cat", "dog")
    cifar(tmp_path, ["train"])
    assert "contains train, which has the format cifar, and cat/1.jpg" in refusal(tmp_path)
