"""index makes the manifest of shards that others wrote, and names what is wrong with them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from support.shards import picture, write_tar

from prelora_ds.data.manifest import EXTENSIONS, INDEX_NAME, MANIFEST_NAME, Manifest
from prelora_ds.data.shards.index import index
from prelora_ds.data.shards.verify import verify
from prelora_ds.data.shards.writer import DIGIT_CLASSES, digits, write_shards
from prelora_ds.errors import ConfigError

PER_SHARD = 90


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_shards(
        digits("val"),
        tmp_path_factory.mktemp("shards") / "val",
        samples_per_shard=PER_SHARD,
        class_names=DIGIT_CLASSES,
    )


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_manifest_is_not_replaced_except_one_of_version_1_whose_classes_stay(whole, folder):
    with pytest.raises(ConfigError, match="there is a manifest already"):
        index(str(folder))
    (folder / MANIFEST_NAME).write_text(
        json.dumps({"version": 1, "classes": [f"digit {i}" for i in range(10)]})
    )
    (folder / INDEX_NAME).unlink()
    assert index(str(folder)).manifest.classes[3] == "digit 3"
    assert np.array_equal(Manifest.load(folder).rows, whole.rows)


def test_images_and_labels_in_their_several_formats(tmp_path):
    images = {"a": picture(1), "b": picture(2, "PNG"), "c": picture(3, "WEBP"), "d": picture(4)}
    write_tar(
        tmp_path / "x" / "0.tar",
        [
            ("a.jpeg", images["a"]),
            ("a.cls", b"2\n"),
            ("b.png", images["b"]),
            ("b.json", b'{"label": 1, "other": "x"}'),
            ("c.webp", images["c"]),
            ("c.json", b'{"label": "eel"}'),
        ],
    )
    write_tar(
        tmp_path / "x" / "1.tar", [("a.jpg", images["d"]), ("a.json", b'{"label": "cat"}')]
    )  # its own a
    made = index(str(tmp_path / "x"), classes=("cat", "dog", "eel")).manifest
    assert made.rows["label"].tolist() == [2, 1, 2, 0]
    assert [EXTENSIONS[code] for code in made.rows["extension"]] == ["jpeg", "png", "webp", "jpg"]
    for row, data in zip(made.rows, images.values(), strict=True):
        with open(made.shard_location(row["shard"]), "rb") as file:
            file.seek(row["offset"])
            assert file.read(row["length"]) == data


def test_the_label_may_stand_under_another_key(tmp_path):
    write_tar(tmp_path / "x" / "0.tar", [("a.jpg", picture(1)), ("a.json", b'{"class_id": 3}')])
    with pytest.raises(
        ConfigError, match=r"0\.tar.*sample 'a' has a \.json without the key 'label'.*'class_id'"
    ):
        index(str(tmp_path / "x"))
    assert index(str(tmp_path / "x"), label_key="class_id").manifest.rows["label"].tolist() == [3]


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def test_pickled_members_are_counted_and_never_decoded(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    trap = pickle.dumps(Trap())
    write_tar(
        tmp_path / "x" / "0.tar",
        [
            ("a.jpg", picture(1)),
            ("a.cls", b"0"),
            ("a.pyd", trap),
            ("b.jpg", picture(2)),
            ("b.cls", b"0"),
            ("b.meta.pkl", trap),
            ("b.pth", trap),
        ],
    )
    made = index(str(tmp_path / "x"))
    assert made.pickled == 3 and len(made.manifest) == 2 and verify(tmp_path / "x") == []
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([], "at byte 0: the shard is empty"),
        (
            [("a.jpg", b"x"), ("a.cls", b"0"), ("b.jpg", b"x")],
            r"at byte 2048, sample 'b' has the members \['jpg'\], and none with its label",
        ),
        (
            [
                ("a.jpg", b"x"),
                ("a.cls", b"0"),
                ("b.jpg", b"x"),
                ("b.cls", b"0"),
                ("a.jpg", b"x"),
                ("a.cls", b"0"),
            ],
            "at byte 4096, sample 'a': duplicate sample name",
        ),
        (
            [("a.jpg", b"x"), ("a.jpg", b"y"), ("a.cls", b"0")],
            "at byte 0, sample 'a': duplicate sample name",
        ),
        (
            [("a.jpg", b"x"), ("a.cls", b"0"), ("b.jpg", b"x"), ("b.cls", b"3")],
            "at byte 2048, sample 'b' has the label 3",
        ),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "at byte 0, sample 'a' has the label -1"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": 1.5}')], "neither a number nor a name"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": tru')], r"has a \.json that cannot be read"),
        (
            [("a.jpg", b"x"), ("a.json", b"[1]")],
            r"has a \.json without the key 'label'; it contains \[1\]",
        ),
        ([("a.jpg", b"x"), ("a.json", b"[" * 100_000)], r"has a \.json that cannot be read"),
        (
            [("a.jpg", b"x"), ("a.json", b'{"label": "caf\xe9"}')],
            r"has a \.json that cannot be read",
        ),
        ([("a.jpg", b"x"), ("a.json", b'{"label": 1, "label": 2}')], "the key 'label' twice"),
        (
            [("a.jpg", b"x"), ("a.json", b'{"label": %s}' % (b"9" * 5000))],
            r"has a \.json that cannot be read",
        ),
        (
            [("a.jpg", b"x"), ("a.json", b'{"label": "zebra"}')],
            "label 'zebra' in its .json, and it is not the name of any of the 3 classes",
        ),
        (
            [("a.jpg", b"x"), ("a.cls", b"zebra")],
            r"has b'zebra' in its \.cls, which is not a number",
        ),
        ([("a.jpg", b"x"), ("a.cls", b"1_0")], "which is not a number"),
        ([("a.jpg", b"x"), ("a.cls", b"")], "which is not a number"),
        ([("a.jpg", b"x"), ("a.cls", "1".encode("utf-16"))], "which is not a number"),
        (
            [("a.jpg", b"x"), ("a.cls", b"9" * 19)],
            "which is not the number of one of the 3 classes",
        ),
    ],
)
def test_a_mistake_in_a_shard_is_named_with_its_offset(tmp_path, members, problem):
    write_tar(tmp_path / "x" / "good.tar", [("a.jpg", b"x"), ("a.cls", b"0")])
    write_tar(tmp_path / "x" / "wrong.tar", members)
    for workers in (1,) if members else (1, 2):
        with pytest.raises(ConfigError, match=rf"SOURCE = .*wrong\.tar.*{problem}"):
            index(str(tmp_path / "x"), classes=("cat", "dog", "eel"), workers=workers)
    assert not (tmp_path / "x" / MANIFEST_NAME).exists()


def test_a_damaged_header_and_a_cut_are_named_with_their_offset(whole, folder):
    for name in (MANIFEST_NAME, INDEX_NAME):
        (folder / name).unlink()
    path, offset = folder / whole.shards[2].name, int(whole.rows["offset"][2 * PER_SHARD + 9])
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[offset - 512 + 3] ^= 4
    for data, place in ((damaged, offset - 512), (original[: offset - 512], offset - 512)):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=rf"shard-000002\.tar.*at byte {place}"):
            index(str(folder))


def test_patterns_name_shards_of_one_folder(whole, folder, tmp_path):
    pattern = f"{folder}/shard-{{000001..000002}}.tar"
    made = index(pattern, tmp_path / "part").manifest
    assert [shard.name for shard in made.shards] == ["shard-000001.tar", "shard-000002.tar"]
    assert made.shard_location(1) == f"{folder}/shard-000002.tar" and verify(tmp_path / "part") == []
    assert np.array_equal(made.rows["crc32"], whole.rows["crc32"][PER_SHARD : 3 * PER_SHARD])
    for source, problem in (
        (f"{folder}/{{a/1,b/2}}.tar", "several folders"),
        (f"{folder}/{{a,a}}.tar", "twice"),
        (str(tmp_path / "none"), "no such folder"),
        (str(tmp_path), "contains no shards"),
    ):
        with pytest.raises(ConfigError, match=problem):
            index(source, tmp_path / "other")
    (folder / "more.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"more\.tar\.gz is compressed"):
        index(str(folder), tmp_path / "other")


@pytest.mark.parametrize(
    "pattern", ["gone-{0..2}.tar", "gone.tar", "*.tar", "{a", "no{where/x-{0..3}.tar"]
)
def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_read(tmp_path, pattern):
    with pytest.raises(
        ConfigError, match=r"SOURCE = .*: (\d of \d shards do not exist|is not a pattern|no such)"
    ):
        index(str(tmp_path / pattern), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path):
    write_tar(tmp_path / "{x}.tar" / "0.tar", [("a.jpg", b"x"), ("a.cls", b"0")])
    assert len(index(str(tmp_path / "{x}.tar")).manifest) == 1


def test_a_label_key_is_honoured_where_there_is_a_cls_too(tmp_path):
    write_tar(
        tmp_path / "x" / "0.tar",
        [
            ("a.jpg", picture(1)),
            ("a.cls", b"0"),
            ("a.json", b'{"fine": 2, "label": 1}'),
            ("b.jpg", picture(2)),
            ("b.cls", b"0"),
            ("b.json", b'{"fine": 1}'),
        ],
    )
    assert index(str(tmp_path / "x"), tmp_path / "cls").manifest.rows["label"].tolist() == [0, 0]
    made = index(str(tmp_path / "x"), tmp_path / "fine", label_key="fine").manifest
    assert (
        made.rows["label"].tolist() == [2, 1]
        and Manifest.load(tmp_path / "fine").label_key == "fine"
    )
    with pytest.raises(
        ConfigError, match=r"sample 'b' has a \.json without the key 'label'(.|\n)*--label-key"
    ):
        index(str(tmp_path / "x"), tmp_path / "label", label_key="label")
    write_tar(tmp_path / "y" / "0.tar", [("a.jpg", picture(1)), ("a.cls", b"0")])
    with pytest.raises(
        ConfigError, match=r"sample 'a' has a \.cls and no \.json(.|\n)*omit --label-key"
    ):
        index(str(tmp_path / "y"), label_key="fine")


@pytest.mark.parametrize(
    ("labels", "classes", "seen"), [([0, 4], 5, 2), ([1, 2], 3, 2), ([999_999], 1_000_000, 1)]
)
def test_without_names_the_classes_are_the_numbers_and_those_without_a_sample_are_reported(
    tmp_path, labels, classes, seen
):
    write_tar(
        tmp_path / "x" / "0.tar",
        [
            member
            for number, label in enumerate(labels)
            for member in ((f"{number}.jpg", b"x"), (f"{number}.cls", b"%d" % label))
        ],
    )
    made = index(str(tmp_path / "x"))
    assert (len(made.manifest.classes), len(np.unique(made.manifest.rows["label"]))) == (classes, seen)


@pytest.mark.parametrize("label", [1_000_000, 2**31, 9_999_999_999])
def test_a_label_that_would_make_millions_of_classes_is_refused(tmp_path, label):
    write_tar(tmp_path / "x" / "0.tar", [("a.jpg", b"x"), ("a.cls", b"%d" % label)])
    with pytest.raises(
        ConfigError,
        match=rf"sample 'a' has the label {label}, and the classes would be the numbers",
    ):
        index(str(tmp_path / "x"))


def test_a_manifest_that_cannot_be_written_is_refused_before_the_shards_are_read(tmp_path):
    write_tar(tmp_path / "x" / "0.tar", [])  # would be refused, too
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(ConfigError, match=r"--out = .*cannot be written there"):
            index(str(tmp_path / "x"), out)


def test_names_that_are_not_utf_8_are_refused(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    write_tar(Path(os.fsdecode(folder)) / "0.tar", [("a.jpg", b"x"), ("a.cls", b"0")])
    with pytest.raises(ConfigError, match="not UTF-8"):
        index(os.fsdecode(folder), tmp_path / "out")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_shards_of_webdatasets_own_writer_are_indexed(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "s-%04d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(8):
            writer.write(
                {
                    "__key__": f"{number:04d}",
                    "jpg": picture(number),
                    "json": {"label": number % 2},
                    "extra.pyd": {"a": 1},
                }
            )
    made = index(str(tmp_path))
    assert [shard.samples for shard in made.manifest.shards] == [3, 3, 2] and made.pickled == 8
    assert made.manifest.rows["label"].tolist() == [0, 1] * 4
