"""Archives, arrays and tables with a part missing, packed, sparse, damaged or hostile: one message
with the file."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import subprocess
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from scipy.io import savemat

from prelora_ds.core.errors import ConfigError
from prelora_ds.data import reading
from prelora_ds.data.sources import KINDS, devkit, find_images
from prelora_ds.data.sources.listing import Request


def picture(number, form="JPEG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def refusal(source, split=None, labels=None, kind=None):
    with pytest.raises(ConfigError) as refused:
        find_images(Request(source, split, labels), kind)
    return str(refused.value)


def found(source, split=None, labels=None):
    """(classes, [(bytes, label)], what was passed over)."""
    listing = find_images(Request(source, split, labels))
    places = [(listing.files[i["file"]], int(i["offset"]), int(i["length"])) for i in listing.items]
    images = [KINDS[listing.kind].read(*place) for place in places]
    return (
        listing.classes,
        list(zip(images, listing.items["label"].tolist(), strict=True)),
        listing.passed_over,
    )


def tar(path, members):
    with tarfile.open(path, "w") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


# --- ILSVRC2012

WNIDS = ("n01440764", "n02099601", "n03888257")
VAL = {f"ILSVRC2012_val_{number:08d}": picture(number) for number in range(1, 5)}
TRUTH = dict(zip(VAL, (2, 0, 1, 0), strict=True))
TABLE = "ImageId,PredictionString\n" + "".join(
    f"{name},{WNIDS[label]} 1 2 3 4 {WNIDS[label]} 5 6 7 8\n"
    for name, label in reversed(TRUTH.items())
)
EXPECTED = [(data, TRUTH[name]) for name, data in VAL.items()]


def kaggle(root):
    """Kaggle's tree: its folder of val images."""
    val = root / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    val.mkdir(parents=True)
    for name, data in VAL.items():
        (val / f"{name}.JPEG").write_bytes(data)
    (root / "LOC_val_solution.csv").write_text(TABLE)
    return val


def test_kaggles_flat_folder_of_val_takes_the_table_above_it_or_the_one_that_is_named(tmp_path):
    val = kaggle(tmp_path)
    assert found(val) == (WNIDS, EXPECTED, "")
    assert found(val, "val") == (WNIDS, EXPECTED, "")
    table = tmp_path / "mine.csv"
    (tmp_path / "LOC_val_solution.csv").rename(table)
    assert "none are beside it" in refusal(val)
    assert found(val, labels=table) == (WNIDS, EXPECTED, "")
    (val / "LOC_val_solution.csv").write_text(TABLE)
    (val / "._ILSVRC2012_val_00000001.JPEG").write_bytes(b"\0\5\x16\7")
    assert found(val) == (WNIDS, EXPECTED, "1 hidden files, 1 other files")
    assert "has the splits val" in refusal(val, "train")


def test_labels_of_kaggles_val_are_those_of_its_train(tmp_path):
    val = kaggle(tmp_path)
    train = val.parent / "train"
    for wnid in WNIDS:
        (train / wnid).mkdir(parents=True)
        (train / wnid / f"{wnid}_1.JPEG").write_bytes(picture(1))
    (val.parent / "test").mkdir()
    assert find_images(Request(train)).classes == find_images(Request(val)).classes == WNIDS
    assert found(val.parent, "train")[1] == [(picture(1), label) for label in range(3)]
    table = tmp_path / "LOC_val_solution.csv"
    assert found(val.parent, "val") == found(val.parent, "val", table) == (WNIDS, EXPECTED, "")


def test_splits_in_the_place_of_a_class_are_refused(tmp_path):
    val = kaggle(tmp_path)
    (val.parent / "train" / WNIDS[0]).mkdir(parents=True)
    said = refusal(tmp_path)
    assert "CLS-LOC" in said and "of splits, in the place of a class" in said
    for name in ("cat/train", "cat/test", "dog/train", "dog/test"):
        (tmp_path / "turned" / name).mkdir(parents=True)
        (tmp_path / "turned" / name / "1.jpg").write_bytes(picture(1))
    assert "turn the folders round" in refusal(tmp_path / "turned")


def test_a_flat_folder_of_other_names_works_where_labels_are_given(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").write_bytes(picture(number, "PNG"))
    (tmp_path / "labels.txt").write_bytes("\ufeff0.png 7\n1.png 0\n\n2.png 3\n".encode())
    classes, read, _ = found(images, labels=tmp_path / "labels.txt")
    assert classes is None and [label for _, label in read] == [7, 0, 3]


def test_a_missing_label_an_image_twice_and_folders_of_classes_are_told(tmp_path):
    val = kaggle(tmp_path)
    (val / "ILSVRC2012_val_00000009.JPEG").write_bytes(picture(9))
    assert "1 images have no label, the first is ILSVRC2012_val_00000009" in refusal(val)
    (val / "ILSVRC2012_val_00000009.JPEG").rename(val / "ILSVRC2012_val_00000001.png")
    assert "ILSVRC2012_val_00000001 comes twice" in refusal(val)
    (tmp_path / "tree" / "cat").mkdir(parents=True)
    said = refusal(tmp_path / "tree", labels=tmp_path / "LOC_val_solution.csv")
    assert "is for a flat folder or a tar of images" in said


@pytest.mark.parametrize(
    ("pack", "command"),
    [
        (gzip.compress, "gunzip"),
        (bz2.compress, "bunzip2"),
        (lzma.compress, "unxz"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "unzstd"),
        (lambda data: b"PK\3\4" + data, "unzip"),
    ],
)
def test_a_packed_tar_is_told_with_the_command_that_unpacks_it(tmp_path, pack, command):
    path = tar(
        tmp_path / "ILSVRC2012_img_val.tar", [(f"{name}.JPEG", data) for name, data in VAL.items()]
    )
    path.write_bytes(pack(path.read_bytes()))
    assert f"unpack it with `{command}`" in refusal(path)
    inner = tar(tmp_path / "train.tar", [("n01440764.tar.gz", path.read_bytes())])
    assert "n01440764.tar.gz is packed" in refusal(inner)


def test_sparse_members_are_refused_and_hidden_ones_are_passed_over(tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text(TABLE)
    mac = [(f"._{name}.JPEG", b"\0\5\x16\7") for name in VAL]
    path = tar(tmp_path / "val.tar", mac + [(f"{name}.JPEG", data) for name, data in VAL.items()])
    assert found(path, labels=labels) == (WNIDS, EXPECTED, "4 hidden members")
    holes = tmp_path / "ILSVRC2012_val_00000001.JPEG"
    with holes.open("wb") as file:
        file.write(VAL[holes.stem])
        file.truncate(1 << 20)
    subprocess.run(["tar", "-S", "-C", tmp_path, "-cf", path, holes.name], check=True)
    assert "stored with holes (sparse)" in refusal(path, labels=labels)


def test_a_bad_image_in_a_tar_has_the_name_of_its_member(tmp_path):
    inner = tar(tmp_path / "inner.tar", [("n01440764_7.JPEG", picture(1))]).read_bytes()
    path = tar(tmp_path / "train.tar", [("n01440764.tar", inner)])
    listing = find_images(Request(path))
    item = listing.items[0]
    name = KINDS["ilsvrc2012"].name(str(path), int(item["offset"]), int(item["length"]))
    assert name == f"{path}, member n01440764_7.JPEG at byte {item['offset']}"


def test_labels_and_split_that_a_tar_of_train_has_no_use_for_are_refused(tmp_path):
    inner = tar(tmp_path / "inner.tar", [("n01440764_7.JPEG", picture(1))]).read_bytes()
    path = tar(tmp_path / "train.tar", [("n01440764.tar", inner)])
    (tmp_path / "labels.csv").write_text(TABLE)
    assert "has the labels of its images in it" in refusal(path, labels=tmp_path / "labels.csv")
    assert "has the splits train" in refusal(path, "val")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "hostile",
    [
        "utf16",
        "latin",
        "packed",
        "picture",
        "pipe",
        "/dev/zero",
        "/",
        "empty",
        "number",
        "negative",
        "huge",
        "folder",
        "loop",
    ],
)
def test_hostile_labels_are_one_message(tmp_path, hostile):
    val, path = kaggle(tmp_path), tmp_path / "labels"
    lines = [f"{name} {label}\n" for name, label in TRUTH.items()]
    text = {
        "utf16": TABLE.encode("utf-16"),
        "latin": TABLE.encode() + b"caf\xe9 1\n",
        "packed": gzip.compress(TABLE.encode()),
        "picture": picture(1),
        "empty": b"",
        "number": b"1\n2\n3\n4\n",
        "negative": "".join(lines).replace(" 2", " -2").encode(),
        "huge": "".join(lines).replace(" 2", " 9" + "0" * 30).encode(),
    }
    if hostile.startswith("/"):
        path = type(path)(hostile)
    elif hostile == "pipe":
        os.mkfifo(path)
    elif hostile == "folder":
        path.mkdir()
    elif hostile == "loop":
        path.symlink_to(path.name)
    else:
        path.write_bytes(text[hostile])
    said = refusal(val, labels=path)
    assert said.startswith("--labels = ") and len(said.splitlines()) == 2


@pytest.mark.parametrize(("place", "byte"), [(130, 255), (162, 255), (273, 255), (305, 14)])
def test_a_damaged_devkit_is_one_message_also_where_its_reader_crashes_or_hangs(
    tmp_path, monkeypatch, place, byte
):
    """At 162 the reader of SciPy 1.17 does not end, at 273 and 305 it ends by a signal."""
    monkeypatch.setattr(devkit, "PATIENCE_S", 8.0)
    val, kit = kaggle(tmp_path), tmp_path / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n3\n")
    rows = [(number + 1, wnid, "words", 0) for number, wnid in enumerate(WNIDS)]
    kind = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")]
    savemat(kit / "meta.mat", {"synsets": np.array(rows, kind)})
    data = bytearray((kit / "meta.mat").read_bytes())
    assert [label for _, label in found(val, labels=kit.parent)[1]] == [0, 1, 2, 2]
    data[place] = byte
    (kit / "meta.mat").write_bytes(data)
    said = refusal(val, labels=kit.parent)
    assert said.startswith("--labels = ") and "meta.mat" in said
    (kit / "meta.mat").write_bytes(data[:200])
    assert "cannot be read as a devkit" in refusal(val, labels=kit.parent)


# --- CIFAR and idx


def cifar(folder, batches, names=("cat", "dog")):
    folder.mkdir(exist_ok=True)
    for name in batches:
        pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
        record = np.concatenate([np.array([[0], [1]], np.uint8), pixels], axis=1)
        (folder / name).write_bytes(
            record.tobytes()
            if name.endswith(".bin")
            else pickle.dumps({"labels": [0, 1], "data": pixels})
        )
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(names)}))
    return folder


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


def idx(folder, name, array):
    data = (
        b"\0\0\x08"
        + bytes([array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


IMAGES, LABELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.array([1, 0], np.uint8)


def test_packed_idx_files_beside_the_plain_ones_are_passed_over_and_told(tmp_path):
    for suffix in ("", ".gz"):
        idx(tmp_path, f"train-images-idx3-ubyte{suffix}", IMAGES)
        idx(tmp_path, f"train-labels-idx1-ubyte{suffix}", LABELS)
    (tmp_path / "._train-images-idx3-ubyte").write_bytes(b"\0\5\x16\7")
    assert "train-images-idx3-ubyte.gz in favour of train-images-idx3-ubyte" in found(tmp_path)[2]


def test_every_flipped_byte_of_a_packed_idx_file_is_told_or_harmless(tmp_path):
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
    assert "cut short" in refusal(tmp_path)
    path.write_bytes(b"\0\0\x08\xff" + bytes(4 * 255))
    refusal(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert "pipe or a device" in refusal(tmp_path)


# --- Hugging Face


def table(count=4, labels=None, names=("a", "b"), image=None, metadata=None):
    labels = [number % 2 for number in range(count)] if labels is None else labels
    image = (
        [{"bytes": picture(number), "path": None} for number in range(count)]
        if image is None
        else image
    )
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    text = json.dumps({"info": {"features": features}}) if metadata is None else metadata
    made = pa.table({"image": image, "label": labels})
    return made.replace_schema_metadata({"huggingface": text}) if text else made


def parquet(path, *arguments, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(table(*arguments, **settings), path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "{}/train-00000-of-00001.parquet",
        "{}/train/0000.parquet",
        "{}/train.parquet",
        "{}/train/part.parquet",
    ],
)
def test_several_configurations_in_one_folder_are_refused_and_each_can_be_named(tmp_path, name):
    for config in ("320px", "full_size"):
        parquet(tmp_path / name.format(config))
    said = refusal(tmp_path)
    assert "the split train is there 2 times, in the folders 320px, full_size" in said
    assert str(tmp_path / "full_size") in said
    assert len(found(tmp_path / "full_size")[1]) == 4


def test_splits_of_one_folder_are_never_merged(tmp_path):
    parquet(tmp_path / "data" / "train.parquet")
    parquet(tmp_path / "data" / "test.parquet", 2)
    assert "has the splits test, train" in refusal(tmp_path)
    assert len(found(tmp_path, "test")[1]) == 2
    parquet(tmp_path / ".cache" / "huggingface" / "test.parquet")
    parquet(tmp_path / "data" / ".ipynb_checkpoints" / "test.parquet")
    assert len(found(tmp_path, "test")[1]) == 2


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["train-00000-of-00002"], "1 of the 2 parts of the split train are missing: number 1"),
        (["train-00001-of-00003", "train-00002-of-00003"], "missing: number 0"),
        (["train-00000-of-99999999999"], "99999999998 of the 99999999999 parts"),
        (["train-00000-of-00001", "train-00000-of-00002"], "do not agree on how many"),
        (["train-00000-of-00001-aaaa", "train-00000-of-00001-bbbb"], "more than once"),
        (["train-00000-of-00001", "train-00001-of-00001"], "beyond the last"),
        (["train/0000", "train/0002"], "missing: number 1"),
    ],
)
def test_missing_and_surplus_parts_are_named(tmp_path, names, problem):
    for name in names:
        parquet(tmp_path / f"{name}.parquet")
    assert problem in refusal(tmp_path)


def test_a_missing_part_of_a_saved_data_set_is_named(tmp_path):
    (tmp_path / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-0.arrow"}], "_split": "x"})
    )
    assert "data-0.arrow" in refusal(tmp_path)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    assert "train" in refusal(tmp_path) and "state.json" in refusal(tmp_path)
    for text in (b"{", b"[]", b"{}", b"\xff", b'{"splits": 1}'):
        (tmp_path / "dataset_dict.json").write_bytes(text)
        refusal(tmp_path)


def test_whole_numbers_without_names_are_labels(tmp_path):
    parquet(tmp_path / "train.parquet", labels=[0, 2, 0, 1], metadata="")
    classes, read, _ = found(tmp_path)
    assert classes is None and [label for _, label in read] == [0, 2, 0, 1]


def test_a_column_of_bytes_holds_images(tmp_path):
    parquet(tmp_path / "train.parquet", image=[picture(number) for number in range(4)])
    assert [data for data, _ in found(tmp_path)[1]] == [picture(number) for number in range(4)]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"image": ["a.jpg"] * 4}, "the column 'image' has the type string"),
        ({"image": [1] * 4}, "the column 'image' has the type int64"),
        (
            {"labels": ["a", "b", "a", "b"], "metadata": ""},
            "the column 'label' has the type string",
        ),
        ({"labels": [0.5, 1, 0, 1], "metadata": ""}, "the column 'label' has the type double"),
        ({"labels": [True, False] * 2, "metadata": ""}, "the column 'label' has the type bool"),
        ({"labels": [9_999_999_999, 0, 0, 0], "metadata": ""}, "labels from 0 to 9999999999"),
        ({"labels": [1_500_000_000, 0, 0, 0], "metadata": ""}, "at most 1,000,000 classes"),
        ({"metadata": "{"}, "cannot be read"),
        ({"metadata": "[]"}, "cannot be read"),
        ({"names": ["a", "a"]}, "'a' comes twice"),
    ],
)
def test_columns_that_hold_something_else_are_told_with_their_type(tmp_path, settings, problem):
    parquet(tmp_path / "train.parquet", **settings)
    said = refusal(tmp_path)
    assert problem in said and str(tmp_path) in said


def test_every_mutation_of_a_parquet_file_is_read_or_one_message(tmp_path):
    data, rng = parquet(tmp_path / "train.parquet").read_bytes(), np.random.default_rng(0)
    end = len(data) - 1200  # the footer: the pages themselves are read only with the images
    for number in range(150):
        mutated = bytearray(data)
        for place in rng.integers(end if number % 2 else 0, len(data), 3):
            mutated[place] ^= int(rng.integers(1, 256))
        (tmp_path / "train.parquet").write_bytes(mutated)
        try:
            find_images(Request(tmp_path))
        except ConfigError as error:
            assert str(tmp_path) in str(error)


# --- any source


@pytest.mark.timeout(20)
def test_pipes_and_devices_are_not_sources(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", type(tmp_path)("/dev/zero")):
        for kind in (None, "ilsvrc2012", "imagefolder"):
            assert len(refusal(path, kind=kind).splitlines()) == 2


def test_a_link_in_a_circle_is_not_a_source(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert "SOURCE" in refusal(tmp_path / "loop")
