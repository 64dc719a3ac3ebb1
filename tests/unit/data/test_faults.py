"""What is broken is named, by shard and offset; it is replaced the same at any world size, counted, and bounded."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.failing_data import OutOfMemory, Says

from prelora_ds.data.corrupt import CorruptBudget, CorruptBudgetError
from prelora_ds.data.datasets import ImagePipeline
from prelora_ds.data.loader import TrainLoader, eval_batches
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.parallel import NoSharedMemoryError
from prelora_ds.data.shards.verify import verify
from prelora_ds.data.shards.writer import write_shards
from prelora_ds.data.store import CorruptSampleError
from prelora_ds.data.workers import WorkerLostError, Workers
from prelora_ds.errors import ConfigError, DiskError, ExpectedError

SAMPLES, BATCH = 30, 12
PIPELINE = ImagePipeline(16, 3, "inception", flip=True)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 samples in 3 shards, each of a class of its own; sample 17 is whole but not an image."""
    images = [b"no picture at all" if i == 17 else png(i) for i in range(SAMPLES)]
    write_shards(((f"{i:03d}", image, "png", i) for i, image in enumerate(images)), tmp_path / "train",
                 samples_per_shard=10, class_names=list(map(str, range(SAMPLES))))
    return tmp_path / "train"


def flip(folder: Path, sample: int, byte: int = 40) -> str:
    """Flip a bit of the sample's picture; returns a pattern of its name and place."""
    row = Manifest.load(folder).rows[sample]
    path = folder / f"shard-{row['shard']:06d}.tar"
    data = bytearray(path.read_bytes())
    data[row["offset"] + byte] ^= 4
    path.write_bytes(data)
    return rf"sample {sample}, {row['length']} bytes from byte {row['offset']} of \S+{path.name}: "


def loader(folder: Path, *, pipeline: ImagePipeline = PIPELINE, **options: object) -> TrainLoader:
    defaults = {"seed": 1, "global_batch_size": BATCH, "micro_batch_size": 2, "rank": 0, "world_size": 1,
                "workers": 0}
    return TrainLoader(Manifest.load(folder), pipeline, **defaults | options)


def epoch_of(folder: Path, **options: object) -> tuple[torch.Tensor, list[int], list[str]]:
    """Pixels, labels and faults of 5 steps: two epochs."""
    made = loader(folder, **options)
    batches = [batch for _ in range(5) for batch in made.next()]
    made.close()
    return (torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches]).tolist(),
            [fault for b in batches for fault in b.faults])


def test_a_picture_that_cannot_be_decoded_is_named_and_replaced_and_counted(folder, capfd):
    row = Manifest.load(folder).rows[17]
    _, labels, faults = epoch_of(folder)
    place = rf"sample 17, 17 bytes from byte {row['offset']} of \S+shard-000001\.tar: not an image: .*; " \
            r"replaced by sample (\d+)"
    found = [re.fullmatch(place, fault, re.DOTALL) for fault in faults]
    assert len(found) == 2 and all(found), faults  # once an epoch
    assert 17 not in labels and len(labels) == 60
    counts = np.bincount(labels, minlength=SAMPLES)
    for match in found:
        counts[int(match[1])] -= 1
    counts[17] += 2
    assert (counts == 2).all()
    assert capfd.readouterr().err.count("warning (rank 0, step ") == 2


@pytest.mark.parametrize("byte", [0, 40, -1])
def test_a_flipped_bit_is_seen_by_the_checksum(folder, byte):
    place = flip(folder, 4, byte if byte >= 0 else int(Manifest.load(folder).rows[4]["length"]) - 1)
    _, labels, faults = epoch_of(folder)
    assert 4 not in labels and any(re.match(place + "checksum", fault) for fault in faults)


def test_a_flipped_bit_in_a_header_costs_no_sample(folder):
    """A tar reader loses the rest of the shard there; we read by place."""
    row = Manifest.load(folder).rows[4]
    path = folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[row["offset"] - 512 + 148] ^= 1  # in the header's own checksum
    path.write_bytes(data)
    _, labels, faults = epoch_of(folder)
    assert sorted(set(labels)) == [i for i in range(SAMPLES) if i != 17] and len(faults) == 2


@settings(deadline=None, max_examples=8)
@given(world_size=st.sampled_from([1, 2, 3, 6]), workers=st.sampled_from([0, 0, 0, 2]))
def test_all_world_sizes_use_the_same_replacement(tmp_path_factory, world_size, workers):
    folder = broken_folder(tmp_path_factory)
    whole = loader(folder, micro_batch_size=12)
    ranks = [loader(folder, rank=rank, world_size=world_size, workers=workers) for rank in range(world_size)]
    for _ in range(3):
        [batch] = whole.next()
        parts = [part for rank in ranks for part in rank.next()]
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert batch.labels.tolist() == torch.cat([part.labels for part in parts]).tolist()
        assert batch.faults == tuple(fault for part in parts for fault in part.faults)
    for made in (whole, *ranks):
        made.close()


_BROKEN: list[Path] = []


def broken_folder(tmp_path_factory) -> Path:
    if not _BROKEN:
        folder = tmp_path_factory.mktemp("broken") / "train"
        write_shards(((f"{i:03d}", png(i), "png", i) for i in range(SAMPLES)), folder, samples_per_shard=10,
                     class_names=list(map(str, range(SAMPLES))))
        for sample in range(0, SAMPLES, 3):
            flip(folder, sample)
        _BROKEN.append(folder)
    return _BROKEN[0]


def test_a_shard_cut_short_or_gone_under_way_is_named(folder):
    made = loader(folder)
    path = folder / "shard-000002.tar"
    row = Manifest.load(folder).rows[25]
    os.truncate(path, int(row["offset"]) + 10)
    faults = [fault for _ in range(3) for batch in made.next() for fault in batch.faults]
    made.close()
    assert any(re.search(r"sample 25, .*shard-000002\.tar: OSError: \[Errno \d+\] short read: 10 bytes", f)
               for f in faults)
    assert {int(re.match(r"sample (\d+)", f)[1]) for f in faults} >= {17, 25, 26, 27, 28, 29}
    with pytest.raises(ConfigError, match=r"shard-000002\.tar.*bytes"):
        Manifest.load(folder)

    os.truncate(path, size_in_manifest(folder, path.name))
    made = loader(folder)
    path.unlink()
    faults = [fault for _ in range(3) for batch in made.next() for fault in batch.faults]
    made.close()
    assert any(re.search(r"shard-000002\.tar: FileNotFoundError", fault) for fault in faults)
    with pytest.raises(ConfigError, match=r"shard-000002\.tar.*missing"):
        Manifest.load(folder)


def size_in_manifest(folder: Path, name: str) -> int:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    return next(int(shard["size_bytes"]) for shard in shards if shard["name"] == name)


def test_shards_of_another_data_set_are_seen_by_size_or_checksum(folder, tmp_path):
    other = tmp_path / "other"
    write_shards(((f"{i:03d}", png(100 + i), "png", i) for i in range(SAMPLES)), other, samples_per_shard=10,
                 class_names=list(map(str, range(SAMPLES))))
    shutil.copy(other / "shard-000001.tar", folder / "shard-000001.tar")
    with pytest.raises(ConfigError, match=r"shard-000001\.tar"):
        Manifest.load(folder)
    os.truncate(folder / "shard-000001.tar", size_in_manifest(folder, "shard-000001.tar"))  # of the right size, then
    _, labels, faults = epoch_of(folder)
    assert {int(re.match(r"sample (\d+)", fault)[1]) for fault in faults} == set(range(10, 20))
    assert not set(labels) & set(range(10, 20))


def test_evaluation_replaces_nothing(folder):
    place = flip(folder, 4)
    with pytest.raises(CorruptSampleError, match=place):
        list(eval_batches(Manifest.load(folder), PIPELINE, batch_size=4, rank=0, world_size=1, workers=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_of_the_evaluation_that_cannot_be_decoded_is_named_in_two_lines(folder, workers):
    manifest = Manifest.load(folder)
    with pytest.raises(CorruptSampleError) as caught:
        list(eval_batches(manifest, PIPELINE, batch_size=4, rank=0, world_size=1, workers=workers))
    assert str(caught.value) == (
        f"sample 17, 17 bytes from byte {manifest.rows['offset'][17]} of {folder}/shard-000001.tar: "
        f"not an image: the bytes are not JPEG, PNG or WEBP\n  remedy: `prelora shards verify {folder} "
        "--decode` lists every image that cannot be decoded; write the shards again without them")
    assert [problem.sample for problem in verify(folder, decode=True)] == [17]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_index_that_is_cut_under_a_loader_ends_it_with_75(folder, workers):
    made = loader(folder, workers=workers)
    made.next()
    os.truncate(folder / "index.npy", 500)
    with pytest.raises(DiskError, match=r"index\.npy': has changed since it was opened") as caught:
        for _ in range(20):
            made.next()
    assert caught.value.exit_code == 75 and len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_without_any_readable_sample_ends_the_loader(tmp_path, workers):
    write_shards(((str(i), b"nothing", "png", 0) for i in range(12)), tmp_path / "bad", samples_per_shard=6,
                 class_names=["one"])
    made = loader(tmp_path / "bad", workers=workers)
    with pytest.raises(CorruptSampleError, match=r"(?s)shard-00000[01]\.tar.*10 replacement samples could not be read"):
        made.next()
    with pytest.raises(ValueError, match="closed"):  # and not the batch after the broken one
        made.next()


def test_a_pickle_in_place_of_a_picture_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "opened"),)

    data = [png(0), pickle.dumps(Bomb()), png(2), png(3)]
    write_shards(((str(i), image, "png", i) for i, image in enumerate(data)), tmp_path / "set", samples_per_shard=4,
                 class_names="abcd")
    made = loader(tmp_path / "set", global_batch_size=4)
    faults = [fault for batch in made.next() for fault in batch.faults]
    assert len(faults) == 1 and "not an image" in faults[0] and not (tmp_path / "opened").exists()


# ---- the budget

def test_the_budget_is_a_share_of_an_epoch_and_restarts_with_each():
    budget = CorruptBudget(0.001, 5000)
    count = (0, 0)
    for epoch, corrupt, after in ((0, 5, 5), (1, 5, 5), (2, 4, 4)):
        count = budget.after(count, epoch, corrupt)
        assert count == (epoch, after) and not budget.exceeded(count)
    count = budget.after(count, 2, 2)
    assert budget.exceeded(count)
    error = budget.error(count, "b")
    assert isinstance(error, CorruptBudgetError)
    assert str(error).startswith("6 unreadable samples in epoch 2 exceed data.corrupt_budget (0.001 of 5000 "
                                 "samples); for example: b\n  remedy: ")


def test_a_budget_of_nothing_bears_nothing():
    budget = CorruptBudget(0.0, 10)
    assert not budget.exceeded((0, 0))
    assert budget.exceeded((0, 1))


# ---- workers

def test_a_worker_without_memory_says_what_to_do_in_two_lines():
    workers = Workers(OutOfMemory(), [[0]], 1, "forkserver")
    # A worker that cannot even report it dies, and the remedy is the same.
    told = r"(more memory .*GiB\)|a data worker died .*)\n  remedy: .*lower data\.workers"
    with pytest.raises(WorkerLostError, match=told) as caught:
        next(workers)
    assert len(str(caught.value).splitlines()) == 2


def test_workers_give_the_same_however_they_are_started(folder):
    """In a process of its own: a fork of this one would copy the locks of other tests' threads."""
    script = f"""
from prelora_ds.data.datasets import ImagePipeline
from prelora_ds.data.loader import TrainLoader
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.parallel import NoSharedMemoryError

if __name__ == "__main__":
    made = []
    for workers, start in ((0, "fork"), (2, "fork"), (2, "forkserver"), (2, "spawn")):
        pipeline = ImagePipeline(16, 3, "inception", True, "medium2", 0.5, 0.5)
        loader = TrainLoader(Manifest.load({str(folder)!r}), pipeline,
                             seed=1, global_batch_size=12, micro_batch_size=2, rank=0, world_size=1, workers=workers,
                             worker_start=start)
        batches = [batch for _ in range(4) for batch in loader.next()]
        made.append([(b.images.numpy().tobytes(), b.labels.tolist(), b.mix.tolist(), b.faults) for b in batches])
        loader.close()
    print([one == made[0] for one in made], any(faults for *_, faults in made[0]))
"""
    path = folder / "script.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=200,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stdout == "[True, True, True, True] True\n", done.stderr[-2000:]


def test_a_killed_worker_is_named_and_ends_the_loader(folder):
    made = loader(folder, workers=2, micro_batch_size=12)
    made.next()
    [killed, _] = made._batches._batches._workers
    time.sleep(1)  # until it waits: torch never gets back a lock of its own that dies with a process
    os.kill(killed.pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError, match=rf"(?s){killed.pid}: -9.*remedy: .* lower data\.workers"):
        for _ in range(50):
            made.next()
    with pytest.raises(ValueError, match="closed"):
        made.next()


def test_mixing_continues_over_a_replaced_sample(folder):
    flip(folder, 3)
    pipeline = replace(PIPELINE, mixup=0.5)
    one = epoch_of(folder, pipeline=pipeline, micro_batch_size=12)
    other = epoch_of(folder, pipeline=pipeline, micro_batch_size=4)
    assert torch.equal(one[0], other[0]) and one[1:] == other[1:]


def test_a_budget_is_the_share_as_it_is_written() -> None:
    """0.29 * 100 is 28.999999999999996."""
    budget = CorruptBudget(0.29, 100)
    assert not budget.exceeded((0, 29)) and budget.exceeded((0, 30))


SMALL_SHM = """
import sys
from prelora_ds.data.datasets import ImagePipeline
from prelora_ds.data.loader import TrainLoader, eval_batches
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.parallel import NoSharedMemoryError
from prelora_ds.data.parallel import map_unordered

def train(manifest, pipeline):
    loader = TrainLoader(manifest, pipeline, seed=1, global_batch_size=16, micro_batch_size=16, rank=0, world_size=1,
                         workers=2, worker_start=sys.argv[3])
    for _ in range(5):
        loader.next()

def evaluate(manifest, pipeline):
    list(eval_batches(manifest, pipeline, batch_size=16, rank=0, world_size=1, workers=2, worker_start=sys.argv[3]))

def build(manifest, pipeline):
    list(map_unordered(abs, range(9), 2))

if __name__ == "__main__":
    try:
        globals()[sys.argv[2]](Manifest.load(sys.argv[1]), ImagePipeline(64, 3, "none"))
    except Exception as error:
        print(type(error).__name__, error.exit_code, error.of_one_rank, error)
"""


def with_shared_memory(size: str, *command: object) -> subprocess.CompletedProcess[str]:
    """``command`` where /dev/shm has only ``size``."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec \"$@\""
    return subprocess.run(["unshare", "-m", "sh", "-c", mount, "sh", *map(str, command)], capture_output=True,
                          text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)


@pytest.mark.parametrize(("size", "act", "start"), [
    ("64k", "train", "forkserver"), ("4k", "train", "forkserver"),
    ("16k", "train", "fork"), ("64k", "train", "spawn"),
    ("64k", "evaluate", "fork"), ("4k", "build", "spawn"),
])
def test_a_small_shared_memory_is_one_message_with_its_size_and_what_to_do(folder, size, act, start):
    if with_shared_memory("4k", "true").returncode:
        pytest.skip("this user may not mount a file system of its own")
    script = folder / "small.py"
    script.write_text(SMALL_SHM)
    ended = with_shared_memory(size, sys.executable, script, folder, act, start)
    mib = "0.1" if size == "64k" else "0.0"
    key = "--workers" if act == "build" else "data.workers"
    assert ended.stdout.startswith(f"NoSharedMemoryError 2 True {key} = 2: /dev/shm, the memory"), ended.stderr[-2000:]
    assert f"it has {mib} MiB, of which 0.0 are free\n  remedy: give it more (docker run --shm-size=16g" in ended.stdout
    assert ("data.workers=0" in ended.stdout) == (act != "build")
    assert "Traceback" not in ended.stderr, ended.stderr


def test_only_a_lack_of_shared_memory_is_reported_as_one():
    no_room = "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"
    with pytest.raises(NoSharedMemoryError, match=r"data\.workers = 1: /dev/shm"):
        next(Workers(Says(), [[no_room]], 1, "forkserver"))
    with pytest.raises(RuntimeError, match="a bug") as caught:
        next(Workers(Says(), [["a bug"]], 1, "forkserver"))
    assert not isinstance(caught.value, ExpectedError)
