"""The manifest against shards that are whole, missing, cut short or damaged."""

from __future__ import annotations

import json
import os
import pickle
import zlib

import fsspec
import numpy as np
import psutil
import pytest

from prelora_ds.data.manifest import (
    EXTENSIONS,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    Shard,
    save_manifest,
)
from prelora_ds.data.rows import ROW, Row
from prelora_ds.data.shards.writer import DIGIT_CLASSES, digits, write_shards
from prelora_ds.data.store import SampleStore
from prelora_ds.errors import ConfigError, DiskError


@pytest.fixture
def shards(tmp_path):
    return write_shards(digits("val"), tmp_path / "val", samples_per_shard=100, class_names=DIGIT_CLASSES)


def change(folder, edit):
    content = json.loads((folder / MANIFEST_NAME).read_text())
    edit(content)
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


def test_load_gives_back_what_was_saved(shards):
    loaded = Manifest.load(shards.folder)
    assert loaded == shards
    assert len(loaded) == 360 and [shard.samples for shard in loaded.shards] == [100, 100, 100, 60]
    assert loaded.classes == DIGIT_CLASSES


def test_every_row_points_at_its_image_and_has_its_checksum(shards):
    written = list(digits("val"))
    for number, shard in enumerate(shards.shards):
        data = (shards.folder / shard.name).read_bytes()
        assert (shard.size_bytes, shard.crc32) == (len(data), zlib.crc32(data))
        for index in range(shard.first, shard.first + shard.samples):
            row, (_, image, extension, label) = shards.rows[index], written[index]
            assert data[row["offset"]:row["offset"] + row["length"]] == image
            assert (row["shard"], row["label"], row["crc32"]) == (number, label, zlib.crc32(image))
            assert EXTENSIONS[row["extension"]] == extension


def test_a_pickled_manifest_takes_the_path_along_and_not_the_rows(shards):
    data = pickle.dumps(shards)
    assert len(data) < shards.rows.nbytes / 4
    copy = pickle.loads(data)
    assert copy == shards and np.array_equal(copy.rows, shards.rows) and not copy.rows.flags.writeable


def large(folder, samples=1_281_167, samples_per_shard=1000):
    """A manifest as large as ImageNet's, of shards that are not there."""
    rows = np.zeros(samples, ROW)
    rows["offset"], rows["length"] = np.arange(samples) % samples_per_shard * 2048 + 512, 1024
    rows = np.split(rows, range(samples_per_shard, samples, samples_per_shard))
    shards = [Shard(f"shard-{i:06d}.tar", samples_per_shard * 2048 + 1024, len(of), 0, 0) for i, of in enumerate(rows)]
    save_manifest(folder, ["one"], shards, rows)
    return shards


def test_an_index_of_1_28_million_samples_is_read_at_its_offset_and_takes_no_memory(tmp_path):
    for shard in large(tmp_path):
        with (tmp_path / shard.name).open("wb") as file:
            file.truncate(shard.size_bytes)
    private = psutil.Process().memory_full_info().uss
    manifest = Manifest.load(tmp_path)
    copies = [pickle.loads(pickle.dumps(manifest)) for _ in range(8)]
    assert len(manifest) == 1_281_167
    for sample in range(0, len(manifest), 9999):
        offset = sample % 1000 * 2048 + 512
        expected = Row(offset, 1024, 0, 0, sample // 1000, 0)
        assert {copy.index.row(sample) for copy in copies} == {expected}
    assert psutil.Process().memory_full_info().uss - private < 20 << 20
    assert manifest.rows["offset"][::1000].sum() == 512 * 1282
    assert manifest.index_file.stat().st_size < 33e6 and len(pickle.dumps(manifest)) < 100_000


def test_an_index_that_is_cut_under_a_reader_is_an_error_with_75_and_no_signal(shards):
    """A mapped file that is cut ends the process with SIGBUS."""
    store = SampleStore(shards)
    store.read(300)
    for size in (shards.index_file.stat().st_size - 1, 2000, 0):
        os.truncate(shards.index_file, size)
        with pytest.raises(DiskError, match=r"index\.npy': has changed since it (.|\n)*again") as caught:
            store.read(300)
        assert caught.value.exit_code == 75
    with pytest.raises(DiskError):
        pickle.loads(pickle.dumps(shards)).index.row(0)
    with pytest.raises(DiskError):
        assert shards.rows is None


def test_an_index_of_the_same_content_is_the_same_and_another_one_is_not(shards, tmp_path):
    store, content = SampleStore(shards), shards.index_file.read_bytes()
    expected = store.read(300)
    os.utime(shards.index_file, (1, 1))
    assert store.read(300) == expected
    (tmp_path / "new").write_bytes(content)
    (tmp_path / "new").replace(shards.index_file)  # as rsync does
    assert store.read(300) == expected == SampleStore(pickle.loads(pickle.dumps(shards))).read(300)
    changed = bytearray(content)
    changed[-25 + 16] ^= 1  # the label of the last sample
    shards.index_file.write_bytes(changed)
    with pytest.raises(DiskError, match="its content has changed"):
        pickle.loads(pickle.dumps(shards)).index.row(0)
    assert store.read(300) == expected  # from the file that was opened, which has no name any more
    shards.index_file.unlink()
    with pytest.raises(DiskError, match="No such file"):
        pickle.loads(pickle.dumps(shards)).index.row(0)
    shards.index_file.write_bytes(content)
    assert store.read(300) == expected


def test_there_is_no_row_before_the_first_and_after_the_last(shards):
    assert shards.index.row(359) == tuple(shards.rows[359].item())
    for sample in (-1, 360):
        with pytest.raises(IndexError):
            shards.index.row(sample)


def test_the_shards_are_checked_only_on_request(shards):
    """One rank per host is: a million ranks times shards would be too many for a file system."""
    (shards.folder / "shard-000002.tar").unlink()
    assert Manifest.load(shards.folder, sizes=False) == shards
    with pytest.raises(ConfigError, match="missing"):
        Manifest.load(shards.folder)


def test_a_manifest_is_read_from_a_url_and_its_index_kept(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = Manifest.load(f"file://{shards.folder}")
    assert remote.shard_location(1) == f"file://{shards.folder}/shard-000001.tar"
    assert np.array_equal(remote.rows, shards.rows)
    assert pickle.loads(pickle.dumps(remote)) == remote
    assert remote.index_file.is_relative_to(tmp_path / "cache")
    fsspec.filesystem("memory").pipe("/copy/manifest.json", (shards.folder / MANIFEST_NAME).read_bytes())
    with pytest.raises(ConfigError, match=r"data\.val = 'memory://copy': cannot be read.*index\.npy"):
        Manifest.load("memory://copy", "data.val")
    assert not (tmp_path / "cache" / "prelora_ds" / "manifests" / "index.npy").exists()


def test_shards_behind_a_protocol_that_is_not_known_are_refused_at_the_start(shards):
    change(shards.folder, lambda c: c.update(base="nothing://bucket"))
    with pytest.raises(ConfigError, match=r"data\.train = 'nothing://bucket': shards there"):
        Manifest.load(shards.folder)


def test_a_manifest_of_version_1_says_what_to_do(shards):
    change(shards.folder, lambda c: c.update(version=1))
    with pytest.raises(ConfigError, match=r"version 1(.|\n)*remedy: run `prelora shards index"):
        Manifest.load(shards.folder)


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
    lambda c: c["shards"][0].update(samples=99),
    lambda c: c["shards"][0].update(samples="many"),
    lambda c: c["shards"].pop(),
    lambda c: c["shards"].reverse(),
    lambda c: c["shards"][0].update(size_bytes=2000),
    lambda c: c.update(index_crc32=1),
])
def test_an_invalid_manifest_is_refused(shards, edit):
    change(shards.folder, edit)
    with pytest.raises(ConfigError, match=r"invalid manifest") as caught:
        Manifest.load(shards.folder, "data.train")
    assert caught.value.key == "data.train" and MANIFEST_NAME in caught.value.value


@pytest.mark.parametrize(("field", "value"), [("offset", -512), ("offset", 10**9), ("label", -1), ("label", 10),
                                              ("shard", 1), ("extension", len(EXTENSIONS))])
def test_an_index_that_points_outside_is_refused_and_the_shard_named(shards, field, value):
    rows = [shards.rows[s.first:s.first + s.samples].copy() for s in shards.shards]
    rows[2][field][7] = value
    with pytest.MonkeyPatch.context() as patch:
        if field == "shard":  # else it is set on writing
            patch.setattr("prelora_ds.data.manifest.enumerate", lambda _: [], raising=False)
        save_manifest(shards.folder, shards.classes, shards.shards, rows)
    with pytest.raises(ConfigError, match=r"invalid manifest.*shard-000002\.tar"):
        Manifest.load(shards.folder)


def test_the_index_of_other_shards_a_damaged_and_a_missing_one_are_refused(shards, tmp_path):
    other = write_shards(digits("val", seed=1), tmp_path / "other", samples_per_shard=100, class_names=DIGIT_CLASSES)
    own = (shards.folder / INDEX_NAME).read_bytes()
    for data in ((other.folder / INDEX_NAME).read_bytes(), own[:-1], own[:5000] + b"x" + own[5001:], b""):
        (shards.folder / INDEX_NAME).write_bytes(data)
        with pytest.raises(ConfigError, match=r"index\.npy has checksum"):
            Manifest.load(shards.folder)
    (shards.folder / INDEX_NAME).unlink()
    with pytest.raises(ConfigError, match=r"holds no index\.npy"):
        Manifest.load(shards.folder)


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
    sizes = rf"{len(data) + change_bytes} bytes, expected {len(data)}"
    with pytest.raises(ConfigError, match=rf"shard-000001\.tar.*{sizes}"):
        Manifest.load(shards.folder)
