"""A tree of folders gives the images of its classes, tells what it passed over, or is refused."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from prelora_ds.data.shards.build_plan import Options
from prelora_ds.data.shards.build_shards import build
from prelora_ds.data.shards.sources import find_images
from prelora_ds.data.shards.sources.folder import shared_pair
from prelora_ds.data.shards.sources.listing import Request
from prelora_ds.errors import ConfigError


def picture(number):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def plant(root, *names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return root


def listed(source, split=None):
    """(classes, relative path -> label) and what was passed over."""
    listing = find_images(Request(source, split))
    assert listing.source_format == "imagefolder"
    files = [os.path.relpath(listing.files[item["file"]], source) for item in listing.items]
    labels = listing.items["label"].tolist()
    return listing.classes, dict(zip(files, labels, strict=True)), listing.skipped


def refusal(source, split=None):
    with pytest.raises(ConfigError) as refused:
        find_images(Request(source, split))
    return str(refused.value)


TWO = ("cat/1.png", "dog/1.png")
FOUND = (("cat", "dog"), {"cat/1.png": 0, "dog/1.png": 1})


@pytest.mark.parametrize("hidden", [
    ".ipynb_checkpoints", ".git", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "#recycle",
    "System Volume Information",
])
def test_folders_of_systems_and_programs_are_not_classes_and_are_reported(tmp_path, hidden):
    plant(tmp_path, *TWO, f"{hidden}/1.png", f"cat/{hidden}/1.png", f"cat/deep/{hidden}/x/1.png")
    (tmp_path / "cat" / "deep" / "2.png").write_bytes(picture(2))
    classes, images, skipped = listed(tmp_path)
    assert (classes, images) == (FOUND[0], FOUND[1] | {"cat/deep/2.png": 0})
    assert skipped == f"the hidden folders {hidden} (3 times)"


def test_hidden_files_and_images_next_to_the_classes_are_reported(tmp_path):
    plant(tmp_path, *TWO, "cat/._1.png", "dog/.DS_Store", "stray.png")
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    classes, images, skipped = listed(tmp_path)
    assert (classes, images) == FOUND
    assert skipped == "2 hidden files, 1 pipes or devices, 1 images next to the folders"


def test_splits_next_to_another_folder_are_refused_with_what_to_write(tmp_path):
    plant(tmp_path, *(f"{split}/{name}" for split in ("train", "val", "extra") for name in TWO))
    said = refusal(tmp_path)
    assert "splits (train, val) next to other folders (extra)" in said and "--split train" in said
    assert str(tmp_path / "train") in said
    classes, images, skipped = listed(tmp_path, "val")
    assert classes == ("cat", "dog") and set(images) == {"val/cat/1.png", "val/dog/1.png"}
    assert skipped == "the folders extra next to the splits"
    assert "extra" in refusal(tmp_path, "extra")


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "validation"), ("train", "dev")])
def test_splits_by_other_names_are_splits_too(tmp_path, names):
    plant(tmp_path, *(f"{split}/{name}" for split in names for name in TWO), ".cache/x/1.png")
    assert "has the splits" in refusal(tmp_path)
    assert listed(tmp_path, names[0])[0] == ("cat", "dog")


def test_a_class_may_be_called_train_where_it_holds_images(tmp_path):
    plant(tmp_path, "bus/1.png", "car/1.png", "train/1.png")
    assert listed(tmp_path)[0] == ("bus", "car", "train")
    plant(tmp_path, "test/1.png")
    assert "splits (test, train) next to" in refusal(tmp_path)


def test_a_split_without_classes_and_a_flat_folder_are_reported(tmp_path):
    plant(tmp_path, "train/1.png", "val/1.png")
    assert "no folder with a sub-folder per class (1 images next to" in refusal(tmp_path, "val")
    assert "looks like none" in refusal(tmp_path / "val")


@pytest.mark.parametrize("above", ["..", "../..", ".", "/"])
@pytest.mark.timeout(20)
def test_a_link_to_a_folder_above_is_refused_without_following_it(tmp_path, above):
    plant(tmp_path / "source", *TWO)
    (tmp_path / "source" / "cat" / "up").symlink_to(above)
    said = refusal(tmp_path / "source")
    assert "cat/up" in said and "a folder above it" in said


def test_a_class_that_is_a_link_to_the_source_is_refused(tmp_path):
    plant(tmp_path, *TWO)
    (tmp_path / "all").symlink_to(tmp_path)
    assert "a folder above it" in refusal(tmp_path)


def test_a_folder_that_is_reached_twice_is_refused(tmp_path):
    plant(tmp_path, *TWO)
    (tmp_path / "cow").symlink_to(tmp_path / "cat")
    assert "cow" in refusal(tmp_path) and "is the same folder as" in refusal(tmp_path)
    (tmp_path / "cow").unlink()
    (tmp_path / "dog" / "more").symlink_to("../cat")
    assert "is the same folder as" in refusal(tmp_path)


def test_a_link_to_nothing_is_an_image_that_its_reader_will_miss(tmp_path):
    plant(tmp_path, *TWO)
    links = {"a.png": "b.png", "b.png": "a.png", "c.png": "nowhere.png", "d": "e"}
    for link, target in links.items():
        (tmp_path / "cat" / link).symlink_to(target)
    classes, images, skipped = listed(tmp_path)
    assert classes == FOUND[0] and skipped == "1 files with no suffix"
    assert images == FOUND[1] | {f"cat/{name}.png": 0 for name in "abc"}


@pytest.mark.parametrize(("link", "target"), [
    ("dog/2.png", "../cat/1.png"), ("cat/0.png", "1.png"), ("cat/2.png", "1.png"),
    ("cow/1.png", "../cat/1.png"),
])
def test_a_file_that_is_reached_twice_is_refused(tmp_path, link, target):
    plant(tmp_path, *TWO)
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(target)
    said = refusal(tmp_path)
    assert link in said and "cat/1.png" in said and "is the same file as" in said


def test_two_links_to_one_file_outside_are_refused(tmp_path):
    plant(tmp_path, *TWO, "elsewhere.bin")
    for name in ("cat", "dog"):
        (tmp_path / name / "2.png").symlink_to(tmp_path / "elsewhere.bin")
    assert "dog/2.png" in refusal(tmp_path) and "cat/2.png" in refusal(tmp_path)


def test_classes_and_images_may_be_links_to_another_place(tmp_path):
    plant(tmp_path / "store", "a/1.png", "b/1.png", "images/0001")
    source = tmp_path / "source"
    (source / "dog").mkdir(parents=True)
    (source / "cat").symlink_to(tmp_path / "store" / "a")
    (source / "dog" / "1.png").symlink_to(tmp_path / "store" / "b" / "1.png")
    (source / "dog" / "2.png").symlink_to(tmp_path / "store" / "images" / "0001")
    assert listed(source)[:2] == (("cat", "dog"), {"cat/1.png": 0, "dog/1.png": 1, "dog/2.png": 1})


def test_all_empty_classes_are_named_at_once(tmp_path):
    plant(tmp_path, *TWO, "eel/notes.txt", "fox/.hidden.png", "gnu/@eaDir/1.png")
    assert "3 of 5 classes have no images: eel, fox, gnu" in refusal(tmp_path)


def test_a_class_name_that_is_not_utf_8_is_refused(tmp_path):
    plant(tmp_path, *TWO)
    name = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(name)
    with open(name + b"/1.png", "wb") as file:
        file.write(picture(3))
    assert r"the class name 'caf\udce9' is not UTF-8" in refusal(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="to become another user takes root")
def test_a_folder_that_may_not_be_read_is_one_message(tmp_path):
    plant(tmp_path / "source", *TWO)
    code = ("import sys; from pathlib import Path; from prelora_ds.errors import ConfigError\n"
            "from prelora_ds.data.shards.sources import find_images, Request\n"
            "import os; os.seteuid(65534)\n"
            "try: find_images(Request(Path(sys.argv[1])))\n"
            "except ConfigError as error: print(error, error.exit_code)")
    for above in [tmp_path, *tmp_path.parents]:
        if above.stat().st_uid == 0 and str(above).startswith("/tmp/"):
            above.chmod(0o755)
    for closed in ("source/cat", "source", ""):
        (tmp_path / closed).chmod(0o700)
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "source")], text=True,
                              capture_output=True, check=True)
        assert "cannot be read (Permission denied)" in done.stdout, (closed, done)
        assert done.stdout.strip().endswith("2")


@pytest.mark.parametrize("names", [
    ("train2017", "val2017"), ("training_set", "test_set"), ("seg_train", "seg_test"),
    ("TrainSet", "TestSet"), ("trainA", "testA"), ("train", "test_set"), ("train_1", "train_2"),
    ("my-train", "my.dev"), ("trainset", "valset"),
    ("traindata", "testdata"), ("Train Images", "Test Images"), ("TRAIN2017", "VAL2017"),
])
def test_folders_whose_names_contain_that_of_a_split_are_splits(tmp_path, names):
    plant(tmp_path, *(f"{split}/{name}" for split in names for name in TWO))
    assert f"has the splits {', '.join(sorted(names))}" in refusal(tmp_path)
    assert listed(tmp_path, names[1])[:2] == (
        ("cat", "dog"), {f"{names[1]}/{name}": label for name, label in FOUND[1].items()})


def test_splits_by_part_of_their_name_next_to_other_folders_are_refused(tmp_path):
    plant(tmp_path, *(f"{split}/{split}/{name}" for split in ("seg_train", "seg_test")
                      for name in TWO), "seg_pred/seg_pred/1.png")
    assert "splits (seg_test, seg_train) next to other folders (seg_pred)" in refusal(tmp_path)
    assert "single class, seg_pred" in refusal(tmp_path / "seg_pred")
    # The split is chosen, and the folder in it is not the only class.
    assert "single class, seg_train" in refusal(tmp_path, "seg_train")
    assert listed(tmp_path / "seg_train" / "seg_train")[0] == ("cat", "dog")


def test_a_split_by_part_of_its_name_next_to_unlabelled_images_is_refused(tmp_path):
    plant(tmp_path, "train2017/cat/1.png", "train2017/dog/1.png", "unlabeled2017/1.png")
    assert "splits (train2017) next to" in refusal(tmp_path)


def test_images_that_lie_in_folders_of_splits_themselves_are_not_classes(tmp_path):
    plant(tmp_path, "train_images/1.png", "test_images/1.png")
    assert "has the splits test_images, train_images" in refusal(tmp_path)


@pytest.mark.parametrize("names", [
    ("passenger_train/1.png", "freight_train/1.png"),
    ("passenger_train/1.png", "test_tube/1.png", "bus/1.png"),
    ("passenger_train/2019/1.png", "test_tube/lab/1.png", "bus/2019/1.png", "car/2019/1.png"),
    ("trainer/a/1.png", "tester/a/1.png", "medieval/a/1.png"),
    ("bus/test_drive/1.png", "bus/train_station/1.png", "bus/stop/1.png", "car/1.png"),
])
def test_classes_whose_names_contain_that_of_a_split_stay_classes(tmp_path, names):
    plant(tmp_path, *names)
    assert listed(tmp_path)[0] == tuple(sorted({name.split("/")[0] for name in names}))


def test_splits_in_place_of_a_class_are_refused_by_part_of_their_name_too(tmp_path):
    plant(tmp_path, *(f"{name}/{split}/1.png" for name in ("cat", "dog")
                      for split in ("train2017", "val2017")))
    assert "where a class is expected" in refusal(tmp_path)


@pytest.mark.parametrize("around", ["images", "train/images", "train2017", "a/b"])
def test_a_folder_around_all_classes_is_not_the_only_class(tmp_path, around):
    plant(tmp_path, *(f"{around}/{name}" for name in TWO))
    assert "would be a single class" in refusal(tmp_path)
    assert listed(tmp_path / around)[0] == ("cat", "dog")


def test_a_single_class_that_holds_its_images_is_a_class(tmp_path):
    plant(tmp_path, "cat/1.png", "cat/more/2.png")
    assert listed(tmp_path)[0] == ("cat",)


def test_two_forms_of_one_name_in_unicode_are_not_two_classes(tmp_path):
    plant(tmp_path, "caf\u00e9/1.png", "cafe\u0301/1.png")
    said = refusal(tmp_path)
    assert r"'cafe\u0301' and 'caf\xe9' are the same text in two Unicode forms" in said
    plant(tmp_path / "one", "cafe\u0301/1.png", "cafe/1.png")
    assert listed(tmp_path / "one")[0] == ("cafe", "cafe\u0301")


def test_classes_in_another_unicode_form_than_those_of_like_are_reported(tmp_path):
    plant(tmp_path / "train", "caf\u00e9/1.png", "b/1.png")
    plant(tmp_path / "val", "cafe\u0301/1.png", "b/1.png")
    build(Request(tmp_path / "train"), tmp_path / "shards", Options())
    with pytest.raises(ConfigError, match=r"'cafe\\u0301'; 'caf\\xe9' is the same text in another") as refused:
        build(Request(tmp_path / "val"), tmp_path / "other", Options(), like=tmp_path / "shards")
    assert (refused.value.key, refused.value.value) == ("--like", str(tmp_path / "shards"))


def test_the_files_of_a_class_without_images_is_named(tmp_path):
    plant(tmp_path, "cat/1.png", "dog/1.GIF", "dog/deep/2.gif", "dog/notes.txt", "dog/.hidden")
    said = refusal(tmp_path)
    lies = "there are: 2 files with .gif, 1 files with .txt"
    assert f"SOURCE = '{tmp_path}/dog': this class has no images; {lies}" in said
    assert "save images in a format that is read (.bmp, .jpeg, .jpg, " in said and "empty folders" not in said
    (tmp_path / "eel").mkdir()
    said = refusal(tmp_path)
    assert "2 of 3 classes have no images: dog, eel; there are: 2 files with .gif, 1 files with .txt" in said
    shutil.rmtree(tmp_path / "dog")
    assert "this class has no images\n  remedy: remove the empty folders" in refusal(tmp_path)


@pytest.mark.parametrize(("first", "second", "files", "shared"), [
    ("annotations", "images", ("images/a/1.png", "images/b/1.png", "annotations/a/1.png", "annotations/b/1.png"),
     "a, b"),
    ("0", "1", ("0/a/1.png", "0/b/1.png", "1/a/1.png", "1/b/1.png"), "a, b"),
    ("original", "resized", ("original/a/x/1.png", "original/b/1.png", "resized/a/1.png", "resized/b/1.png"), "a, b"),
    ("masks", "images", ("images/a/1.png", "images/b/1.png", "masks/a/1.png"), "a"),
    ("annotations", "images", ("images/a/1.png", "images/b/1.png", "annotations/a/1.xml", "annotations/b/1.xml"),
     "a, b"),
])
def test_folders_whose_sub_folders_may_be_the_classes_are_refused(tmp_path, first, second, files, shared):
    text = refusal(plant(tmp_path, *files))
    assert f"{first} and {second} both have {shared}" in text
    assert f"may have the classes {', '.join(sorted((first, second)))} or the classes a, b" in text
    named = [second] if first == "masks" or files[-1].endswith(".xml") else [first, second]
    assert f"if a, b are the classes, name {' or '.join(str(tmp_path / name) for name in named)}; if " in text
    assert listed(tmp_path / second)[0] == ("a", "b")


@pytest.mark.parametrize("files", [
    ("cat/images/1.png", "dog/images/1.png"),  # Tiny-ImageNet
    ("cat/images/1.png", "cat/boxes/1.txt", "dog/images/1.png", "dog/boxes/1.txt"),
    ("cat/2019/1.png", "cat/a/1.png", "dog/2019/1.png", "dog/b/1.png"),  # one in common
    ("cat/a/1.png", "cat/b/1.png", "dog/a/1.png", "dog/b/1.png", "dog/1.png"),
    ("cat/a/1.png", "cat/b/1.png", "dog/c/1.png"),
])
def test_sub_folders_that_are_not_classes_stay_within_their_class(tmp_path, files):
    assert listed(plant(tmp_path, *files))[0] == ("cat", "dog")


def test_many_classes_with_the_same_sub_folder_are_fast(tmp_path):
    below = {str(number): {"images", str(number)} for number in range(2000)}
    assert shared_pair(below) is None
    assert shared_pair(below | {"x": {"images"}}) == ("x", "0")
