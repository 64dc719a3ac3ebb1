"""Copies of shards on the node, and shards that are read over the network."""

from __future__ import annotations

import functools
import http.server
import io
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.staging import stage, stage_and_report
from support.web import Server

from prelora_ds.data.cache import ShardCache
from prelora_ds.data.datasets import ImagePipeline
from prelora_ds.data.loader import TrainLoader
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.shards.writer import write_shards
from prelora_ds.data.store import CorruptSampleError, SampleStore

SAMPLES = 24
PIPELINE = ImagePipeline(8, 3, "inception", flip=True)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make(folder: Path, first: int = 0) -> Manifest:
    return write_shards(((f"{i:03d}", png(first + i), "png", i) for i in range(SAMPLES)), folder, samples_per_shard=6,
                        class_names=list(map(str, range(SAMPLES))))


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make(tmp_path / "train")


@pytest.fixture(params=[Server])
def url(request: pytest.FixtureRequest, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) \
        -> Iterator[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    handler = functools.partial(request.param, directory=str(manifest.folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def batches(manifest: Manifest, cache: ShardCache | None = None, workers: int = 0) -> tuple[torch.Tensor, list[str]]:
    loader = TrainLoader(manifest, PIPELINE, seed=0, global_batch_size=12, micro_batch_size=6, rank=0, world_size=1,
                         workers=workers, cache=cache)
    found = [batch for _ in range(4) for batch in loader.next()]
    loader.close()
    return torch.cat([batch.images for batch in found]), [fault for batch in found for fault in batch.faults]



def copies(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def total(manifest: Manifest) -> int:
    return sum(shard.size_bytes for shard in manifest.shards)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_url_gives_the_batches_of_its_folder_with_and_without_a_cache(manifest, url, tmp_path, workers):
    remote = Manifest.load(url)
    expected, _ = batches(manifest)
    images, faults = batches(remote, workers=workers)
    assert torch.equal(images, expected) and not faults
    images, faults = batches(remote, ShardCache(tmp_path / "cache", 2 * total(manifest)), workers=workers)
    assert torch.equal(images, expected) and not faults


def test_staged_shards_are_whole_and_are_read_in_place_of_the_original(manifest, tmp_path):
    cache = ShardCache(tmp_path / "cache", total(manifest))
    stage(manifest, cache)
    assert sum(file.stat().st_size for file in copies(cache.folder)) == total(manifest)
    for number, shard in enumerate(manifest.shards):
        copy = cache.path_of_copy(shard)
        assert copy is not None and Path(copy).read_bytes() == Path(manifest.shard_location(number)).read_bytes()
        Path(manifest.shard_location(number)).unlink()  # nobody looks there any more
    images, faults = batches(manifest, ShardCache(tmp_path / "cache", total(manifest)))
    assert len(images) == 48 and not faults


def test_what_does_not_fit_is_read_from_the_original_and_the_limit_holds(manifest, tmp_path, capsys):
    limit = 2 * manifest.shards[0].size_bytes + 100
    cache = ShardCache(tmp_path / "cache", limit)
    stage(manifest, cache)
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and " is full (" in said and f"read from {manifest.folder}" in said
    assert len(copies(cache.folder)) == 2
    assert sum(file.stat().st_size for file in copies(cache.folder)) <= limit
    images, faults = batches(manifest, cache)
    assert torch.equal(images, batches(manifest)[0]) and not faults


def test_the_least_recently_used_of_other_data_sets_make_room(manifest, tmp_path):
    other = make(tmp_path / "other", first=500)
    cache = ShardCache(tmp_path / "cache", total(manifest) + other.shards[0].size_bytes + 100)
    stage(other, cache)
    for age, shard in enumerate(other.shards):  # the first was used last
        os.utime(cache.path_of_copy(shard), (1e9 - age, 1e9 - age))
    stage(manifest, cache)
    assert all(cache.path_of_copy(shard) for shard in manifest.shards)
    fresh = ShardCache(cache.folder, cache.limit_bytes)
    assert [fresh.path_of_copy(shard) is not None for shard in other.shards] == [True, False, False, False]


def test_a_copy_of_other_bytes_is_not_kept_and_a_bad_one_is_thrown_away(manifest, tmp_path):
    cache = ShardCache(tmp_path / "cache", 2 * total(manifest))
    path = Path(manifest.shard_location(0))
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(data[:600]) + b"x" + bytes(data[601:]))
    with pytest.raises(OSError, match="checksum"):
        cache.add(manifest.shards[0], str(path))
    path.write_bytes(data)
    assert cache.path_of_copy(manifest.shards[0]) is None and not copies(cache.folder)
    assert cache.add(manifest.shards[0], str(path))
    copy = Path(cache.path_of_copy(manifest.shards[0]))
    copy.write_bytes(bytes(len(data)))  # the node's disk has gone bad
    store = SampleStore(manifest, cache)
    assert store.read(0) == (bytearray(png(0)), 0) and not copy.exists()
    store.close()


def test_an_evicted_copy_is_read_from_the_original_again(manifest, tmp_path):
    cache = ShardCache(tmp_path / "cache", 2 * total(manifest))
    stage(manifest, cache)
    store = SampleStore(manifest, cache)
    assert cache.path_of_copy(manifest.shards[0])
    for file in copies(cache.folder):
        file.unlink()
    assert store.read(0)[1] == 0 and store.read(7)[1] == 7
    store.close()


def test_two_processes_at_once_fetch_each_shard_once(manifest, tmp_path):
    context = multiprocessing.get_context("spawn")
    folder, results = tmp_path / "cache", context.Queue()
    both = [context.Process(target=stage_and_report, args=(manifest, folder, total(manifest), results))
            for _ in range(2)]
    for process in both:
        process.start()
    copied = [results.get(timeout=60) for _ in both]
    for process in both:
        process.join()
    assert sorted(name for names in copied for name in names) == [shard.name for shard in manifest.shards]
    assert sum(file.stat().st_size for file in copies(folder)) == total(manifest)
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == [".lock"]



def test_what_a_killed_process_left_is_cleared_away(manifest, tmp_path):
    cache = ShardCache(tmp_path / "cache", total(manifest))
    cache.folder.mkdir()
    (cache.folder / "deadbeef-9-shard.tar.partial").write_bytes(bytes(total(manifest)))
    stage(manifest, cache)
    assert len(copies(cache.folder)) == len(manifest.shards)


def test_a_folder_that_cannot_be_written_is_a_warning_and_training_continues(manifest, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("prelora_ds.data.cache._PAUSE_AFTER_ERROR_S", 0.0)
    (tmp_path / "cache").write_text("a file")
    images, faults = batches(manifest, ShardCache(tmp_path / "cache", total(manifest)))
    assert torch.equal(images, batches(manifest)[0]) and not faults
    assert "warning: " in capfd.readouterr().err
    stage(manifest, ShardCache(tmp_path / "cache", total(manifest)))
    assert capfd.readouterr().err.count("warning: ") == 1  # and not one per shard


def test_a_copy_that_can_neither_be_read_nor_removed_is_skipped(manifest, tmp_path):
    cache = ShardCache(tmp_path / "cache", total(manifest))
    for shard in manifest.shards:
        (cache.folder / f"{shard.crc32:08x}-{shard.size_bytes}-{shard.name}").mkdir(parents=True)
    images, faults = batches(manifest, cache)
    assert torch.equal(images, batches(manifest)[0]) and not faults


def test_a_server_that_is_gone_is_named_with_shard_and_offset(manifest, url, monkeypatch):
    monkeypatch.setattr("prelora_ds.data.store._WAIT_S", 0.01)
    remote = Manifest.load(url)
    Path(manifest.shard_location(1)).unlink()
    store = SampleStore(remote)
    with pytest.raises(CorruptSampleError, match=rf"sample 8, .* from byte {remote.rows['offset'][8]} of {url}/shard-"
                                                 r"000001\.tar: FileNotFoundError"):
        store.read(8)
    assert store.read(3)[1] == 3
    store.close()


def test_a_bad_moment_of_a_store_is_tried_again(manifest, monkeypatch):
    monkeypatch.setattr("prelora_ds.data.store._WAIT_S", 0.0)
    store, calls, pread = SampleStore(manifest), [], os.preadv

    def flaky(*args: object) -> int:
        calls.append(args)
        if len(calls) < 3:
            raise OSError(116, "Stale file handle")
        return pread(*args)

    monkeypatch.setattr(os, "preadv", flaky)
    assert store.read(2)[1] == 2 and len(calls) == 3
    store.close()


@pytest.mark.parametrize("url", [http.server.SimpleHTTPRequestHandler], indirect=True)
def test_a_server_without_ranges_is_distinguished_from_a_cut_shard(url):
    remote = Manifest.load(url)
    size = remote.shards[0].size_bytes
    with pytest.raises(CorruptSampleError, match=rf"got {size} bytes for a range of \d+: does the server support"):
        SampleStore(remote).read(0)
