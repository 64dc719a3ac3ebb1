"""Shards of a source are the same bytes whoever writes them, and however often the build was killed."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from prelora_ds.commands.shards import rank_and_world_size
from prelora_ds.data.decode import decode
from prelora_ds.data.manifest import EXTENSIONS, Manifest
from prelora_ds.data.parallel import WorkerDiedError, map_unordered
from prelora_ds.data.shards import build_shards as building
from prelora_ds.data.shards.build_plan import shuffled
from prelora_ds.data.shards.build_shards import Options, StalledError, build
from prelora_ds.data.shards.images import UnreadableImageError, prepare
from prelora_ds.data.shards.sources.arrays import idx_array
from prelora_ds.data.shards.sources.listing import ITEM, Request
from prelora_ds.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the shards to the collector
IMAGES = 40
FASHION = Path("/usr/share/datasets/fashion-mnist")


def picture(number, form="JPEG", size=(24, 20), mode="RGB"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder for each class, and the label of each image's bytes."""
    root, labels = tmp_path_factory.mktemp("source"), {}
    for number in range(IMAGES):
        label = number % 3
        path = root / f"class{label}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(number))
        labels[path.read_bytes()] = label
    return root, labels


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


OPTIONS = Options(samples_per_shard=8, seed=3)


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """What an uninterrupted build writes."""
    return contents(build(Request(tree[0]), tmp_path_factory.mktemp("whole") / "out", OPTIONS).folder)


def read_by_webdataset(folder):
    urls = sorted(map(str, Path(folder).glob("*.tar")))
    return [(sample[extension], int(sample["cls"])) for sample in webdataset.WebDataset(urls, shardshuffle=False)
            for extension in EXTENSIONS if extension in sample]


def test_the_webdataset_package_reads_every_image_untouched_and_mixed(tree, tmp_path):
    manifest = build(Request(tree[0]), tmp_path / "out", OPTIONS)
    read = read_by_webdataset(manifest.folder)
    assert dict(read) == tree[1] and len(read) == len(manifest) == IMAGES
    assert manifest.classes == ("class0", "class1", "class2")
    assert [shard.samples for shard in manifest.shards] == [8] * 5
    assert all(len({label for _, label in read[start:start + 8]}) > 1 for start in range(0, IMAGES, 8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_workers_and_ranks_write_the_same_bytes(tree, whole, tmp_path):
    assert contents(build(Request(tree[0]), tmp_path / "workers", OPTIONS, workers=2).folder) == whole
    other = contents(build(Request(tree[0]), tmp_path / "seed", Options(8, seed=4)).folder)
    assert other.keys() == whole.keys() and other != whole


def command(tree, out, *more):
    return [sys.executable, "-c", "from prelora_ds.cli import main; main()", "shards", "build", str(tree[0]), str(out),
            "--samples-per-shard", "8", "--seed", "3", *more]


def environment(**more):
    return {key: value for key, value in os.environ.items()
            if not key.startswith(("RANK", "WORLD_SIZE", "OMPI_", "PMI", "SLURM_"))} | more


def test_each_rank_of_a_job_writes_its_part_and_rank_0_waits(tree, whole, tmp_path):
    ranks = [subprocess.Popen(command(tree, tmp_path / "out", "--workers", "1"), stdout=subprocess.PIPE, text=True,
                              env=environment(SLURM_PROCID=str(rank), SLURM_STEP_NUM_TASKS="3")) for rank in range(3)]
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
    said = [rank.communicate()[0] for rank in ranks]
    assert "40 samples of 3 classes in 5 shards" in said[0] and said[1:] == ["", ""]
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(("environ", "expected"), [
    ({}, (0, 1)), ({"SLURM_PROCID": "0", "SLURM_NTASKS": "64"}, (0, 1)),  # a batch script, which is not a task of srun
    ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "64"}, (5, 64)), ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2)),
    ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
     (3, 4)),
    ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
])
def test_rank_and_world_size_come_from_the_launcher(environ, expected):
    assert rank_and_world_size(environ) == expected


def test_a_rank_that_is_not_of_its_job_is_refused():
    with pytest.raises(ConfigError, match="RANK=2 WORLD_SIZE=2"):
        rank_and_world_size({"RANK": "2", "WORLD_SIZE": "2"})


def test_under_mpiexec(tree, whole, tmp_path):
    done = subprocess.run(["mpiexec", "--allow-run-as-root", "--oversubscribe", "-n", "2",
                           *command(tree, tmp_path / "out", "--workers", "1")],
                          env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("40 samples") == 1
    assert contents(tmp_path / "out") == whole


def test_a_killed_build_continues_to_the_same_bytes(tree, whole, tmp_path, monkeypatch):
    """Killed for real, while the second shard is half written; the images are fed in slowly through a pipe."""
    slow = tmp_path / "slow.py"
    slow.write_text("import time\nfrom prelora_ds.data.shards import build_shards as build\nread = build.prepare\n"
                    "def prepare(*a, **k):\n    time.sleep(0.05)\n    return read(*a, **k)\n"
                    "build.prepare = prepare\nfrom prelora_ds.cli import main\nmain()\n")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    running = subprocess.Popen([sys.executable, str(slow), *command(tree, out, "--workers", "1")[3:]],
                               env=environment(), stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (len(list(partial.glob("shard-*.tar"))) == 1 and list(partial.glob(".shard-000001*"))):
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    first = (partial / "shard-000000.tar").stat()
    assert not out.exists() and list(partial.glob(".shard-000001*"))  # cut off in the middle
    assert contents(build(Request(tree[0]), out, OPTIONS).folder) == whole
    assert (out / "shard-000000.tar").stat().st_ino == first.st_ino  # kept, not written again
    assert not partial.exists()


def test_a_kill_between_the_last_two_steps_is_mended(tree, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(building.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(Request(tree[0]), tmp_path / "out", OPTIONS)
    assert (tmp_path / "out" / "work").exists()
    build(Request(tree[0]), tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == whole


@pytest.fixture
def interrupted(tree, tmp_path):
    """The folder of a build that has two of five shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "write_shard", stopping(building.write_shard, 2))
        with pytest.raises(KeyboardInterrupt):
            build(Request(tree[0]), tmp_path / "out", OPTIONS)
    return tmp_path / "out"


def stopping(function, after):
    def stop(job):
        if job.shard == after:
            raise KeyboardInterrupt
        return function(job)

    return stop


@pytest.mark.parametrize(("options", "more", "key"), [
    (Options(samples_per_shard=9, seed=3), {}, "--samples-per-shard = 9"), (Options(8, seed=4), {}, "--seed = 4"),
    (Options(8, 3, resize_short=10), {}, "--resize-short = 10"),
    (OPTIONS, {"source_format": "idx"}, "--format = 'idx'"),
])
def test_other_options_do_not_go_on_with_an_unfinished_build(tree, interrupted, options, more, key):
    before = contents(interrupted.with_name("out.partial") / "work")
    with pytest.raises(ConfigError, match=f"{key}.*the unfinished build in .*out.partial has"):
        build(Request(tree[0]), interrupted, options, **more)
    assert contents(interrupted.with_name("out.partial") / "work") == before


def test_a_build_continues_by_its_plan_and_not_by_what_the_source_has_become(tree, interrupted, whole, tmp_path):
    extra = tree[0] / "class0" / "new.jpg"
    extra.write_bytes(picture(1000))
    try:
        assert contents(build(Request(tree[0]), interrupted, OPTIONS).folder) == whole
    finally:
        extra.unlink()


def test_other_ranks_leave_the_message_to_rank_0(tree, interrupted):
    for out in (interrupted, tree[0]):
        assert build(Request(tree[0]), out, Options(8, seed=4), rank=1, world_size=2) is None


def test_a_host_with_another_pillow_says_so_itself(tree, interrupted, monkeypatch):
    monkeypatch.setattr("PIL.__version__", "1.0")
    with pytest.raises(ConfigError, match=r"Pillow = '1\.0'"):
        build(Request(tree[0]), interrupted, Options(8, seed=3), rank=1, world_size=2)


def test_a_worker_that_is_killed_is_reported():
    with pytest.raises(WorkerDiedError, match="run the same command again"):
        list(map_unordered(os._exit, [1, 1, 1], 2))


def test_an_existing_folder_is_refused_and_untouched(tree, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        build(Request(tree[0]), tmp_path / "out", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_with_a_mistake_leaves_nothing_behind(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        build(Request(tmp_path / "none"), tmp_path / "out", OPTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("damage", "workers"), [
    (b"no image", 1), (b"", 2), (picture(0)[:-400], 1), (picture(0, "PNG")[:-30], 1)])
def test_an_image_that_cannot_be_read_is_named(tmp_path, damage, workers):
    for number in range(4):
        (tmp_path / "in" / "class").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "class" / f"{number}.jpg").write_bytes(damage if number == 2 else picture(number))
    with pytest.raises(ConfigError, match=r"SOURCE = .*class/2\.jpg.*cannot be read"):
        build(Request(tmp_path / "in"), tmp_path / "out", OPTIONS, workers=workers)
    assert not (tmp_path / "out").exists()


def test_ranks_that_stop_are_reported_with_the_shard_that_is_missing(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "PATIENCE_S", 0.5)
    monkeypatch.setattr(building, "PLAN_PATIENCE_S", 0.5)
    with pytest.raises(StalledError, match=r"rank 0 has written no plan(.|\n)*same command again"):
        build(Request(tree[0]), tmp_path / "none", OPTIONS, rank=1, world_size=2)
    with pytest.raises(StalledError, match=r"2 shards are missing, the first is number 1(.|\n)*same command again"):
        build(Request(tree[0]), tmp_path / "out", OPTIONS, rank=0, world_size=2)
    assert build(Request(tree[0]), tmp_path / "out", OPTIONS, rank=1, world_size=2) is None
    assert len(build(Request(tree[0]), tmp_path / "out", OPTIONS, rank=0, world_size=2)) == IMAGES


@pytest.mark.skipif(os.geteuid() != 0, reason="to mount a small disk takes root")
def test_a_full_disk_is_one_message_and_a_rerun_with_space_continues(tree, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no mounts in this container")
    try:
        failed = subprocess.run(command(tree, disk / "out", "--workers", "2"), env=environment(), capture_output=True,
                                text=True, timeout=120, check=False)
        assert failed.returncode == 75
        message = [line for line in failed.stderr.splitlines() if not re.fullmatch(r"\d+/\d+ shards", line)]
        assert len(message) == 2 and "the disk is full" in message[0] and "same command again" in message[1]
        partial = disk / "out.partial"
        assert not (disk / "out").exists() and not list(partial.glob(".*"))
        for path in partial.glob("shard-*.tar"):
            assert path.read_bytes() == whole[path.name]
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        again = subprocess.run(command(tree, disk / "out", "--workers", "1"), env=environment(), capture_output=True,
                               text=True, timeout=120, check=False)
        assert again.returncode == 0, again.stderr
        assert contents(disk / "out") == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_at_the_last_file_too(tree, whole, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr(building, "save_manifest", lambda *a: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
        with pytest.raises(ConfigError, match="the disk is full"):
            build(Request(tree[0]), tmp_path / "out", OPTIONS)
    assert contents(build(Request(tree[0]), tmp_path / "out", OPTIONS).folder) == whole


def test_val_takes_the_classes_of_train_by_name(tree, tmp_path):
    train = build(Request(tree[0]), tmp_path / "train", OPTIONS)
    (tmp_path / "val" / "class2").mkdir(parents=True)
    (tmp_path / "val" / "class2" / "1.jpg").write_bytes(picture(1))
    val = build(Request(tmp_path / "val"), tmp_path / "out", OPTIONS, like=train.folder)
    assert val.classes == train.classes and val.rows["label"].tolist() == [2]
    (tmp_path / "val" / "zebra").mkdir()
    (tmp_path / "val" / "zebra" / "1.jpg").write_bytes(picture(1))
    with pytest.raises(ConfigError, match=r"--like.*'zebra'"):
        build(Request(tmp_path / "val"), tmp_path / "out2", OPTIONS, like=train.folder)


def write_idx(folder, labels):
    folder.mkdir()
    count = len(labels).to_bytes(4, "big")
    (folder / "images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + count + b"\0\0\0\x02" * 2 + bytes(4 * len(labels)))
    (folder / "labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + count + bytes(labels))
    return folder


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_debians_fashion_mnist_through_the_webdataset_package(tmp_path):
    manifest = build(Request(FASHION, "test"), tmp_path / "out", Options(samples_per_shard=4000), workers=2)
    pixels, labels = (idx_array(str(FASHION / f"t10k-{name}-ubyte.gz")) for name in ("images-idx3", "labels-idx1"))
    read = read_by_webdataset(manifest.folder)
    assert sorted((np.asarray(Image.open(io.BytesIO(data))).tobytes(), label) for data, label in read) == sorted(
        (image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True))


def test_a_label_out_of_range_is_named(tmp_path):
    train = build(Request(write_idx(tmp_path / "a", [0, 1, 2])), tmp_path / "train", OPTIONS)
    assert train.classes == ("0", "1", "2")
    source = write_idx(tmp_path / "b", [2, 0, 3, 1])
    with pytest.raises(ConfigError, match=r"images-idx3-ubyte.*image 2 .*label 3, and there are only 3 classes"):
        build(Request(source), tmp_path / "val", OPTIONS, like=train.folder)


def test_rows_of_parquet_are_mixed_within_windows_of_blocks():
    items = np.zeros(4000, ITEM)
    items["file"], items["block"] = np.arange(4000) // 1000, np.arange(4000) % 1000 // 10
    order = shuffled(items, 0)
    assert sorted(order) == list(range(4000))
    for start in range(0, 4000, 160):
        window = items[order[start:start + 160]]
        assert len(np.unique(window)) == 16  # whole blocks, of all files
    assert len(np.unique(items["file"][order[:160]])) > 1
    assert (np.diff(order[:160]) == 1).sum() < 5


@pytest.mark.parametrize(("form", "mode", "extension"), [
    ("JPEG", "RGB", "jpg"), ("JPEG", "L", "jpg"), ("JPEG", "CMYK", "jpg"), ("PNG", "RGBA", "png"), ("PNG", "P", "png"),
    ("WEBP", "RGB", "webp"),
])
def test_bytes_stay_untouched_and_the_extension_tells_their_format(form, mode, extension):
    data = picture(1, form, mode=mode)
    for short in (None, 20):
        assert prepare(data, resize_short=short, quality=90) == (data, extension)
    assert decode(data, 3).shape == (24, 20, 3)


def test_other_formats_become_png_pixel_by_pixel():
    data, extension = prepare(picture(1, "BMP"), resize_short=None, quality=90)
    assert extension == "png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))),
                          np.asarray(Image.open(io.BytesIO(picture(1, "BMP")))))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P", "1", "I;16"])
def test_a_resize_leaves_the_short_side_and_a_jpeg_of_the_quality(mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    if mode == "I;16":
        buffer = io.BytesIO()
        Image.fromarray(np.full((60, 90), 40_000, np.uint16)).save(buffer, "PNG")
        source = buffer.getvalue()
    else:
        source = picture(1, form, (60, 90), mode)
    data, extension = prepare(source, resize_short=32, quality=90)
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size, extension) == ("JPEG", (48, 32), "jpg")
    assert image.mode == ("L" if mode in ("L", "1", "I;16") else "RGB")
    if mode == "I;16":
        assert abs(int(np.asarray(image).mean()) - (40_000 >> 8)) <= 1
    assert len(prepare(source, resize_short=32, quality=30)[0]) < len(data) or mode == "I;16"


def test_a_resized_photograph_looks_the_same():
    from skimage import data as photographs

    pixels = photographs.astronaut()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    small = prepare(buffer.getvalue(), resize_short=128, quality=95)[0]
    expected = torch.nn.functional.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), (128, 128),
                                               mode="bicubic", antialias=True)[0].clamp(0, 255)
    difference = torch.from_numpy(decode(small, 3)).permute(2, 0, 1).float() - expected
    assert difference.pow(2).mean().sqrt() < 5  # 34 dB: the JPEG alone


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_image_cut_short_anywhere_is_not_an_image(form):
    data = picture(3, form, (64, 64))
    for length in [*range(0, len(data) - 12, 301), len(data) * 9 // 10]:
        with pytest.raises(UnreadableImageError):
            prepare(data[:length], resize_short=None, quality=90)


def test_the_plan_is_whole_or_not_there(interrupted):
    plan = json.loads((interrupted.with_name("out.partial") / "work" / "plan.json").read_text())
    assert plan["asked"]["--seed"] == 3 and len(plan["files"]) == IMAGES
    with pytest.raises(ConfigError, match="no such folder"):
        Manifest.load(interrupted)
