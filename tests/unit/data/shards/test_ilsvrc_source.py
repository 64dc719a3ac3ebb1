"""ImageNet's tars and flat folders, with labels from all their places, and one message for each
fault."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import subprocess

import numpy as np
import pytest
from scipy.io import savemat
from support.sources import EXPECTED, TABLE, TRUTH, VAL, WNIDS, found, kaggle, picture, refusal, tar

from prelora_ds.data.shards.sources import SOURCE_FORMATS, devkit, find_images
from prelora_ds.data.shards.sources.listing import Request


def test_kaggles_flat_folder_of_val_takes_the_table_above_it_or_the_one_that_is_named(tmp_path):
    val = kaggle(tmp_path)
    assert found(val) == (WNIDS, EXPECTED, "")
    assert found(val, "val") == (WNIDS, EXPECTED, "")
    table = tmp_path / "mine.csv"
    (tmp_path / "LOC_val_solution.csv").rename(table)
    assert "there are none next to it" in refusal(val)
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


def test_splits_in_place_of_a_class_are_refused(tmp_path):
    val = kaggle(tmp_path)
    (val.parent / "train" / WNIDS[0]).mkdir(parents=True)
    said = refusal(tmp_path)
    assert "CLS-LOC" in said and "of splits, where a class is expected" in said
    for name in ("cat/train", "cat/test", "dog/train", "dog/test"):
        (tmp_path / "turned" / name).mkdir(parents=True)
        (tmp_path / "turned" / name / "1.jpg").write_bytes(picture(1))
    assert "swap the two levels" in refusal(tmp_path / "turned")


def test_a_flat_folder_of_other_names_works_where_labels_are_given(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").write_bytes(picture(number, "PNG"))
    (tmp_path / "labels.txt").write_bytes("\ufeff0.png 7\n1.png 0\n\n2.png 3\n".encode())
    classes, read, _ = found(images, labels=tmp_path / "labels.txt")
    assert classes is None and [label for _, label in read] == [7, 0, 3]


def test_a_missing_label_a_duplicate_image_and_folders_of_classes_are_reported(tmp_path):
    val = kaggle(tmp_path)
    (val / "ILSVRC2012_val_00000009.JPEG").write_bytes(picture(9))
    assert "1 images have no label, the first is ILSVRC2012_val_00000009" in refusal(val)
    (val / "ILSVRC2012_val_00000009.JPEG").rename(val / "ILSVRC2012_val_00000001.png")
    assert "ILSVRC2012_val_00000001 occurs twice" in refusal(val)
    (tmp_path / "tree" / "cat").mkdir(parents=True)
    said = refusal(tmp_path / "tree", labels=tmp_path / "LOC_val_solution.csv")
    assert "applies to a flat folder or a tar of images" in said


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
def test_a_packed_tar_is_reported_with_the_command_that_unpacks_it(tmp_path, pack, command):
    path = tar(
        tmp_path / "ILSVRC2012_img_val.tar", [(f"{name}.JPEG", data) for name, data in VAL.items()]
    )
    path.write_bytes(pack(path.read_bytes()))
    assert f"unpack it with `{command}`" in refusal(path)
    inner = tar(tmp_path / "train.tar", [("n01440764.tar.gz", path.read_bytes())])
    assert "n01440764.tar.gz is packed" in refusal(inner)


def test_sparse_members_are_refused_and_hidden_ones_are_skipped(tmp_path):
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
    name = SOURCE_FORMATS["ilsvrc2012"].name(str(path), int(item["offset"]), int(item["length"]))
    assert name == f"{path}, member n01440764_7.JPEG at byte {item['offset']}"


def test_labels_and_split_that_a_tar_of_train_does_not_need_are_refused(tmp_path):
    inner = tar(tmp_path / "inner.tar", [("n01440764_7.JPEG", picture(1))]).read_bytes()
    path = tar(tmp_path / "train.tar", [("n01440764.tar", inner)])
    (tmp_path / "labels.csv").write_text(TABLE)
    assert "contains the labels of its images" in refusal(path, labels=tmp_path / "labels.csv")
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


def flat(folder, table, names=("1", "2", "3", "a b")):
    """A flat folder of images, and a table of labels."""
    (folder / "flat").mkdir(exist_ok=True)
    for name in names:
        (folder / "flat" / f"{name}.jpg").write_bytes(picture(1))
    (folder / "labels.csv").write_text(table)
    return folder / "flat", folder / "labels.csv"


@pytest.mark.parametrize("table", [
    "1.jpg,3\n2.jpg,4\n3.jpg,5\na b.jpg,6\n",
    "filename,label\n1.jpg,3\n2.jpg,4\n3.jpg,5\n\"a b.jpg\",6\n",
    "image;class\n1.jpg; 3\n2.jpg;4\n3.jpg;5;\na b.jpg;6\n",
    "1.jpg\t3\n2.jpg\t4\n3.jpg\t5\na b.jpg\t6\n",
    "1.jpg 3\n2.jpg   4\n3.jpg 5 \n\"a b.jpg\" 6\n",
])
def test_a_table_has_titles_or_none_and_any_of_the_usual_separators(tmp_path, table):
    source, labels = flat(tmp_path, table)
    assert [label for _, label in found(source, labels=labels)[1]] == [3, 4, 5, 6]


@pytest.mark.parametrize(("table", "said"), [
    ("1.jpg,0,1\n2.jpg,1,0\n", "line 1, '1.jpg,0,1': has 3 fields"),
    (",image,label\n0,1.jpg,1\n", "line 1, ',image,label': has 3 fields"),
    ("1.jpg,0\n2.jpg,1\na b.jpg 1\n", "line 3, 'a b.jpg 1': has 3 fields"),
    ("1.jpg n00000001 5\n", "line 1, '1.jpg n00000001 5': has 3 fields"),
    ("1.jpg,n00000001\n2.jpg,n1\n3.jpg,n00000002\n", "line 2, '2.jpg,n1': the label 'n1' is not a "
     "WordNet id, as other labels are"),
    ("1.jpg,cat\n2.jpg,1\n3.jpg,1\n", "line 1, '1.jpg,cat': the label 'cat' is not a number, as"),
    ("1.jpg,1\n2.jpg,n00000001\n3.jpg,1\n", "line 2, '2.jpg,n00000001': the label"),
    ("1.jpg,cat\n2.jpg,dog\n", "line 1, '1.jpg,cat': the label 'cat' is neither a WordNet id"),
    ("1.jpg,1\n,2\n", "line 2, ',2': no image"), ("1.jpg,1\n,\n", "line 2, ',': no image"),
    ("1.jpg,1\n2.jpg,\n", "line 2, '2.jpg,': no label"),
])
def test_the_line_of_a_table_that_is_wrong_is_named(tmp_path, table, said):
    source, labels = flat(tmp_path, table)
    assert said in refusal(source, labels=labels)
