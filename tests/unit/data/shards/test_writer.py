"""Shards are written whole or not at all, always the same, and as the webdataset package reads them."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from prelora_ds.data.shards.writer import (
    DIGIT_CLASSES,
    PHOTOGRAPH_CLASSES,
    digits,
    photographs,
    write_digits,
    write_shards,
)
from prelora_ds.errors import ConfigError

CLASSES = ("cat", "dog")


def picture(colour, form):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, form)
    return buffer.getvalue()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(samples, folder, samples_per_shard=3):
    return write_shards(samples, folder, samples_per_shard=samples_per_shard, class_names=CLASSES)


def some(count):
    return [(f"{i:03d}", picture((i, 0, 0), "PNG"), "png", i % 2) for i in range(count)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the shards to the garbage collector
def test_the_webdataset_package_reads_the_same_keys_bytes_and_labels(tmp_path):
    manifest = write_shards(digits("val"), tmp_path / "val", samples_per_shard=100, class_names=DIGIT_CLASSES)
    urls = [str(manifest.folder / shard.name) for shard in manifest.shards]
    read = [(s["__key__"], s["png"], "png", int(s["cls"])) for s in webdataset.WebDataset(urls, shardshuffle=False)]
    assert read == list(digits("val"))


def test_the_same_samples_give_the_same_bytes_and_nothing_else_is_left(tmp_path):
    for name in ("a", "b"):
        write(some(7), tmp_path / "deep" / name)
    assert contents(tmp_path / "deep" / "a") == contents(tmp_path / "deep" / "b")
    assert sorted(contents(tmp_path / "deep" / "a")) == [
        "index.npy", "manifest.json", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a", "b"]


def test_an_existing_folder_is_refused_and_untouched(tmp_path):
    write(some(3), tmp_path / "data")
    before = contents(tmp_path / "data")
    with pytest.raises(ConfigError, match="already exists"):
        write(some(6), tmp_path / "data")
    assert contents(tmp_path / "data") == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        write(some(6), tmp_path / "empty")


def test_a_folder_made_in_the_meantime_is_not_replaced(tmp_path):
    def slow():
        yield from some(3)
        (tmp_path / "data").mkdir()

    with pytest.raises(ConfigError, match="in the meantime"):
        write(slow(), tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == [] and [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_source_that_fails_leaves_nothing(tmp_path):
    def failing():
        yield from some(5)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        write(failing(), tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sample", "problem"), [
    (("000", b"x", "png", 0), "unique"),
    (("a.b", b"x", "png", 0), "without a dot"),
    (("", b"x", "png", 0), "not empty"),
    (("9", b"x", "gif", 0), "unknown image format"),
    (("9", b"x", "PNG", 0), "unknown image format"),
    (("9", b"x", "png", 2), "outside the 2 classes"),
    (("9", b"x", "png", -1), "outside the 2 classes"),
    (("9", b"", "png", 0), "empty image"),
])
def test_a_sample_that_readers_would_lose_is_refused(tmp_path, sample, problem):
    with pytest.raises(ConfigError, match=problem):
        write([*some(4), sample], tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_no_samples_and_empty_shards_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no samples"):
        write([], tmp_path / "data")
    with pytest.raises(ConfigError, match="samples_per_shard = 0"):
        write(some(2), tmp_path / "data", samples_per_shard=0)


def test_the_digits_are_split_once_and_by_class():
    splits = {name: list(digits(name)) for name in ("train", "val")}
    assert {name: len(samples) for name, samples in splits.items()} == {"train": 1437, "val": 360}
    keys = [sample[0] for samples in splits.values() for sample in samples]
    assert sorted(map(int, keys)) == list(range(1797))
    for _, count in sorted(Counter(label for *_, label in splits["val"]).items()):
        assert 34 <= count <= 37  # a tenth of 360, as near as the classes' own counts allow
    assert splits["train"] == list(digits("train"))
    assert splits["train"] != list(digits("train", seed=1))


def test_a_digit_keeps_its_pixels_and_its_label():
    images, labels = load_digits(return_X_y=True)
    for key, image, _, label in list(digits("val"))[:20]:
        pixels = np.asarray(Image.open(io.BytesIO(image)))
        assert pixels.shape == (8, 8) and pixels.dtype == np.uint8 and label == labels[int(key)]
        assert np.abs(pixels - images[int(key)].reshape(8, 8) * 255 / 16).max() <= 0.5
    with pytest.raises(ConfigError, match="split = 'test'"):
        next(digits("test"))


def test_photographs_are_different_jpegs_of_the_asked_size_and_always_the_same():
    samples = list(photographs(30, seed=1, short_side=64))
    assert samples == list(photographs(30, seed=1, short_side=64))
    assert len({data for _, data, _, _ in samples}) == 30
    assert {data for _, data, _, _ in samples}.isdisjoint(data for _, data, _, _ in photographs(30, 2, 64))
    for _, data, extension, label in samples:
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode, extension) == ("JPEG", "RGB", "jpg")
        assert 57 <= min(image.size) <= 71 and max(image.size) <= 3 * min(image.size)
        assert np.asarray(image).std() > 2 and 0 <= label < len(PHOTOGRAPH_CLASSES)


def test_photographs_that_could_not_be_decoded_are_refused_before_any_is_made(tmp_path):
    with pytest.raises(ConfigError, match="--short-side = 14500: images of more than") as refused:
        photographs(1, short_side=14500)
    most = int(refused.value.remedy.split()[1])
    assert 8_000 < most < 12_000
    photographs(1, short_side=most)
    with pytest.raises(ConfigError, match="--short-side"):
        photographs(1, short_side=most + 1)


@pytest.mark.parametrize("there", ["train", "val"])
def test_no_split_is_written_where_the_folder_of_one_exists(tmp_path, there):
    (tmp_path / there).mkdir()
    with pytest.raises(ConfigError, match=f"{there}.*already exists"):
        write_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [there]


def test_a_link_to_nothing_is_in_the_way_too(tmp_path):
    (tmp_path / "data").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="already exists"):
        write(some(2), tmp_path / "data")


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", Path("/proc/x"), tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"folder = .*cannot be written \(") as refused:
            write_digits(place)
        assert refused.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_a_reason_to_try_again(tmp_path):
    """A limit on the size of this process's files stands for the disk."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from prelora_ds.data.shards.writer import write_digits\n"
        "from prelora_ds.errors import DiskError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_digits(Path(sys.argv[1]))\n"
        "except DiskError as error: sys.exit(error.exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == 75 and list(tmp_path.iterdir()) == []
