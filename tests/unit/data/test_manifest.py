"""The manifest against shards that are whole, missing, cut short or damaged."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from prelora_ds.core.errors import ConfigError
from prelora_ds.data.manifest import MANIFEST_NAME, Manifest, index_shard
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


def change(folder, edit):
    content = json.loads((folder / MANIFEST_NAME).read_text())
    edit(content)
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


def test_load_gives_back_what_was_saved(shards):
    loaded = Manifest.load(shards.folder)
    assert loaded == shards
    assert len(loaded) == 360 and [len(shard.samples) for shard in loaded.shards] == [100, 100, 100, 60]
    assert loaded.classes == DIGIT_CLASSES


def test_every_entry_points_at_its_image(shards):
    for shard, start in zip(shards.shards, range(0, 360, 100), strict=True):
        data = (shards.folder / shard.name).read_bytes()
        assert shard.size_bytes == len(data)
        for number, (_, image, extension, label) in enumerate(list(digits("val"))[start:start + 100]):
            sample = shard.samples[number]
            assert data[sample.offset:sample.offset + sample.length] == image
            assert (sample.extension, sample.label) == (extension, label)


def test_a_missing_folder_and_a_folder_without_manifest_name_the_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.val = .*nowhere.*: no such folder"):
        Manifest.load(tmp_path / "nowhere", "data.val")
    with pytest.raises(ConfigError, match=r"data\.train = .*holds no manifest\.json"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("edit", [
    lambda c: c.update(version=99),
    lambda c: c.pop("classes"),
    lambda c: c.update(shards=[]),
    lambda c: c.update(classes=["only one"]),
    lambda c: c["shards"][0].update(name="../elsewhere.tar"),
    lambda c: c["shards"][0]["samples"].append([512, 10]),
    lambda c: c["shards"][0]["samples"].append([-512, 10, "png", 0]),
    lambda c: c["shards"][0]["samples"].append([10**9, 10, "png", 0]),
    lambda c: c["shards"][0]["samples"].append(["512", 10, "png", 0]),
])
def test_an_invalid_manifest_is_refused(shards, edit):
    change(shards.folder, edit)
    with pytest.raises(ConfigError, match=r"invalid manifest") as caught:
        Manifest.load(shards.folder, "data.train")
    assert caught.value.key == "data.train" and MANIFEST_NAME in caught.value.value


def test_a_manifest_cut_short_is_refused(shards):
    path = shards.folder / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="invalid manifest"):
        Manifest.load(shards.folder)


def test_a_missing_shard_is_named(shards):
    (shards.folder / "shard-000002.tar").unlink()
    with pytest.raises(ConfigError, match=r"shard-000002\.tar.*missing"):
        Manifest.load(shards.folder)


@pytest.mark.parametrize("change_bytes", [-512, -1, 1])
def test_a_shard_of_another_size_is_named(shards, change_bytes):
    path = shards.folder / "shard-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:change_bytes] if change_bytes < 0 else data + b"\0")
    with pytest.raises(ConfigError, match=rf"shard-000001\.tar.*{len(data) + change_bytes} bytes, and {len(data)}"):
        Manifest.load(shards.folder)


def test_a_shard_cut_short_anywhere_is_never_indexed(shards, tmp_path):
    """Python's tarfile, and webdataset on top of it, ends at most of these cuts without an error."""
    data = (shards.folder / "shard-000003.tar").read_bytes()
    used = max(sample.offset + sample.length for sample in shards.shards[3].samples)
    path = tmp_path / "cut.tar"
    for size in [0, 1, 511, 512, *range(513, used + 512, 1777), used - 1, used]:
        path.write_bytes(data[:size])
        with pytest.raises(ConfigError, match=r"cut\.tar"):
            index_shard(path)


def test_a_flipped_bit_in_any_header_is_never_passed_over(shards, tmp_path):
    data = (shards.folder / "shard-000003.tar").read_bytes()
    path = tmp_path / "flipped.tar"
    for sample in shards.shards[3].samples[::7]:
        damaged = bytearray(data)
        damaged[sample.offset - 512 + 130] ^= 1  # in the header of the image, its size
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
        shard, data = index_shard(path), path.read_bytes()
        assert [(sample.extension, sample.label) for sample in shard.samples] == [("jpg", 3), ("png", 4), ("jpg", 5)]
        assert [data[s.offset:s.offset + s.length] for s in shard.samples] == [b"jpeg", b"png", b"j" * 1000]


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
