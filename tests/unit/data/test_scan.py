"""A shard that is whole is indexed, and any other is refused, with the place of its damage."""

from __future__ import annotations

import io
import tarfile

import pytest

from prelora_ds.core.errors import ConfigError
from prelora_ds.data.manifest import EXTENSIONS
from prelora_ds.data.scan import index_shard
from prelora_ds.data.writer import DIGIT_CLASSES, digits, write_shards


@pytest.fixture
def shards(tmp_path):
    return write_shards(digits("val"), tmp_path / "val", samples_per_shard=100, class_names=DIGIT_CLASSES)


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_shard_cut_short_anywhere_is_never_indexed(shards, tmp_path):
    """Python's tarfile, and webdataset on top of it, ends at most of these cuts without an error."""
    data = (shards.folder / "shard-000003.tar").read_bytes()
    used = int((shards.rows["offset"] + shards.rows["length"])[300:].max())
    path = tmp_path / "cut.tar"
    for size in [0, 1, 511, 512, *range(513, used + 512, 1777), used - 1, used]:
        path.write_bytes(data[:size])
        with pytest.raises(ConfigError, match=r"cut\.tar"):
            index_shard(path)


def test_a_flipped_bit_in_any_header_is_never_passed_over(shards, tmp_path):
    data = (shards.folder / "shard-000003.tar").read_bytes()
    path = tmp_path / "flipped.tar"
    for sample in shards.rows[300::7]:
        damaged = bytearray(data)
        damaged[sample["offset"] - 512 + 130] ^= 1  # in the header of the image, its size
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"flipped\.tar"):
            index_shard(path)


def test_other_members_folders_and_long_names_are_no_obstacle(tmp_path):
    long = "x" * 200
    members = [("readme", b"text"), ("a/1.cls", b"3"), ("a/1.JPG", b"jpeg"), ("a/1.json", b"{}"), ("b.d/1.png", b"png"),
               ("b.d/1.cls", b"4\n"), ("b.d/1.mask.png", b"no"), (f"{long}.cls", b"5"), (f"{long}.jpg", b"j" * 1000)]
    with pytest.raises(ConfigError, match="readme"):  # a sample of its own, to webdataset too
        index_shard(write_tar(tmp_path / "a.tar", members, format=tarfile.PAX_FORMAT))
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = write_tar(tmp_path / "a.tar", members[1:], format=form)
        rows, data = index_shard(path).rows, path.read_bytes()
        assert [(EXTENSIONS[row["extension"]], row["label"]) for row in rows] == [("jpg", 3), ("png", 4), ("jpg", 5)]
        assert [data[r["offset"]:r["offset"] + r["length"]] for r in rows] == [b"jpeg", b"png", b"j" * 1000]


@pytest.mark.parametrize("members", [
    [("1.jpg", b"image")],
    [("1.cls", b"3")],
    [("1.cls", b"3"), ("1.jpg", b"image"), ("1.png", b"image")],
    [("1.cls", b"three"), ("1.jpg", b"image")],
    [("1.cls", b"3"), ("1.jpg", b"")],
    [("1.cls", b"3"), ("2.cls", b"3"), ("1.jpg", b"image"), ("2.jpg", b"image")],
])
def test_a_sample_that_is_not_one_image_and_one_label_is_refused(tmp_path, members):
    with pytest.raises(ConfigError, match=r"1\.tar"):
        index_shard(write_tar(tmp_path / "1.tar", members))
