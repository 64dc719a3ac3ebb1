"""verify finds every change and names its shard; index gives the same manifest again."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import tarfile
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.shards import picture, write_tar

from prelora_ds.data.manifest import INDEX_NAME, MANIFEST_NAME, Manifest
from prelora_ds.data.shards.index import index
from prelora_ds.data.shards.verify import verify
from prelora_ds.data.shards.writer import DIGIT_CLASSES, digits, write_shards
from prelora_ds.errors import ConfigError

PER_SHARD = 90


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_shards(digits("val"), tmp_path_factory.mktemp("shards") / "val", samples_per_shard=PER_SHARD,
                        class_names=DIGIT_CLASSES)


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_whole_shards_are_whole(whole):
    assert verify(whole.folder) == verify(whole.folder, workers=2) == []
    assert verify(f"file://{whole.folder}") == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found_and_its_shard_and_sample_named(whole, folder, data):
    number = data.draw(st.integers(0, 3), "shard")
    name = whole.shards[number].name
    original = (whole.folder / name).read_bytes()
    bit = data.draw(st.integers(0, 8 * len(original) - 1), "bit")
    damaged = bytearray(original)
    damaged[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(damaged)
    try:
        problems = verify(folder)
    finally:
        (folder / name).write_bytes(original)
    assert problems and {problem.shard for problem in problems} == {name}
    rows = whole.rows[number * PER_SHARD:(number + 1) * PER_SHARD]
    inside = (rows["offset"] <= bit // 8) & (bit // 8 < rows["offset"] + rows["length"])
    if inside.any():
        at = int(np.argmax(inside))
        assert (problems[0].sample, problems[0].offset) == (number * PER_SHARD + at, rows["offset"][at])
        assert "wrong checksum" in problems[0].problem


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_cut_anywhere_is_found_and_the_first_lost_sample_named(whole, folder, data):
    number = data.draw(st.integers(0, 3), "shard")
    name, rows = whole.shards[number].name, whole.rows[number * PER_SHARD:(number + 1) * PER_SHARD]
    original = (whole.folder / name).read_bytes()
    size = data.draw(st.integers(0, len(original) - 1), "size")
    (folder / name).write_bytes(original[:size])
    try:
        problems = verify(folder)
    finally:
        (folder / name).write_bytes(original)
    kept = int((rows["offset"] + rows["length"] <= size).sum())
    assert [(p.shard, p.sample, p.offset) for p in problems] == [
        (name, number * PER_SHARD + kept if kept < PER_SHARD else None, size)]
    assert f"{size} bytes, expected {len(original)};" in problems[0].problem
    assert f"{PER_SHARD - kept} images are lost" in problems[0].problem


def test_other_labels_headers_and_padding_are_distinguished(whole, folder):
    name, row = whole.shards[1].name, whole.rows[PER_SHARD + 5]
    header = int(row["offset"]) - tarfile.BLOCKSIZE
    label = int(row["offset"]) + tarfile.BLOCKSIZE * (1 + -(-int(row["length"]) // tarfile.BLOCKSIZE))
    original = (folder / name).read_bytes()
    for place, wanted, sample in ((label, r"label \d, expected \d", PER_SHARD + 5),
                                  (header + 124, f"cut short at byte {header}", PER_SHARD + 5),
                                  (len(original) - 1, "follows the end of the archive", None),
                                  (int(row["offset"]) + int(row["length"]), "padding", None)):
        damaged = bytearray(original)
        damaged[place] ^= 1
        (folder / name).write_bytes(damaged)
        problem, = verify(folder)
        assert (problem.shard, problem.sample) == (name, sample)
        assert re.search(wanted, problem.problem), problem


def test_missing_longer_and_exchanged_shards_are_all_listed(whole, folder):
    names = [shard.name for shard in whole.shards]
    (folder / names[0]).unlink()
    with (folder / names[1]).open("ab") as file:
        file.write(b"\0")
    shutil.copy(whole.folder / names[2], folder / names[3])
    assert {problem.shard for problem in verify(folder)} == {names[0], names[1], names[3]}
    assert "missing" in verify(folder)[0].problem


def test_a_damaged_index_is_found(folder):
    data = bytearray((folder / INDEX_NAME).read_bytes())
    data[1000] ^= 1
    (folder / INDEX_NAME).write_bytes(data)
    with pytest.raises(ConfigError, match=r"index\.npy has checksum"):
        verify(folder)


def test_shards_without_a_manifest_get_the_same_one_again(whole, folder):
    before = {name: (folder / name).read_bytes() for name in (MANIFEST_NAME, INDEX_NAME)}
    for name in before:
        (folder / name).unlink()
    assert index(str(folder), workers=2).manifest.classes == whole.classes
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_verify_reads_labels_in_json_as_index_did(tmp_path):
    members = [("a.jpg", picture(1)), ("a.json", b'{"name": "eel"}')]
    path = write_tar(tmp_path / "x" / "0.tar", members)
    index(str(path.parent), classes=("cat", "eel"), label_key="name")
    data = bytearray(path.read_bytes())
    data[512 + len(members[0][1])] ^= 1  # padding: no sample is harmed
    path.write_bytes(data)
    problem, = verify(path.parent)
    assert problem.sample is None and "padding" in problem.problem
    path.write_bytes(path.read_bytes().replace(b"eel", b"cat"))
    assert "label 0, expected 1" in verify(path.parent)[0].problem


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_not_a_file_is_not_waited_for(folder, tmp_path, kind):
    path = folder / "shard-000001.tar"
    path.unlink()
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "device": functools.partial(os.symlink, "/dev/zero")}
    make[kind](path)
    assert [(p.shard, p.problem) for p in verify(folder)] == [(path.name, "is not a file")]
    with pytest.raises(ConfigError, match=r"shard-000001\.tar'?: is not a file"):
        index(str(folder), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"shard-000001\.tar"):
        Manifest.load(folder)


def test_what_cannot_be_decoded_is_listed_when_asked_for(tmp_path):
    images = {"a.jpg": picture(1), "b.jpg": b"<html>404</html>", "c.png": picture(2, "PNG")[:-30]}
    write_tar(tmp_path / "x" / "0.tar", [member for name, data in images.items()
                                         for member in ((name, data), (f"{name[0]}.cls", b"0"))])
    write_tar(tmp_path / "x" / "1.tar", [("a.webp", picture(3, "WEBP")), ("a.cls", b"0")])
    rows = index(str(tmp_path / "x")).manifest.rows
    assert verify(tmp_path / "x") == []
    for workers in (1, 2):
        problems = verify(tmp_path / "x", decode=True, workers=workers)
        found = [(p.shard, p.sample, p.offset) for p in problems]
        assert found == [("0.tar", number, rows["offset"][number]) for number in (1, 2)]
        assert all("cannot be decoded: " in p.problem for p in problems)
    os.truncate(tmp_path / "x" / "1.tar", 520)
    assert [p.sample for p in verify(tmp_path / "x", decode=True)] == [1, 2, 3]


@pytest.fixture
def served(folder):
    """The folder over http, from a real server."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_shards_behind_a_url_are_indexed_loaded_and_verified(whole, folder, served, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Manifest.load(served).rows["crc32"].tolist() == whole.rows["crc32"].tolist()
    assert verify(served) == []
    for name in (MANIFEST_NAME, INDEX_NAME):
        (folder / name).unlink()
    for source in (served, f"{served}/shard-{{000000..000003}}.tar"):
        out = tmp_path / f"index-{'{' in source}"
        made = index(source, out).manifest
        assert made == Manifest.load(out) and made.shard_location(3) == f"{served}/shard-000003.tar"
        assert np.array_equal(made.rows, whole.rows)
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-1000])
    (folder / "shard-000002.tar").unlink()
    assert [problem.shard for problem in verify(out)] == ["shard-000001.tar", "shard-000002.tar"]
    with pytest.raises(ConfigError, match="--out"):
        index(served)


def test_shards_in_other_remote_places_go_through_fsspec(whole, tmp_path):
    memory = fsspec.filesystem("memory")
    for shard in whole.shards:
        memory.pipe(f"/bucket/{shard.name}", (Path(whole.folder) / shard.name).read_bytes())
    try:
        assert np.array_equal(index("memory://bucket", tmp_path / "out").manifest.rows, whole.rows)
    finally:
        memory.rm("/bucket", recursive=True)
    with pytest.raises(ConfigError, match=r"SOURCE = 'nothing://x': cannot be listed"):
        index("nothing://x", tmp_path / "other")
