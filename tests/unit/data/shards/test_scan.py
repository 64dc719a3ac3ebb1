"""A shard that is whole is indexed, and any other is refused, with the place of its damage."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tarfile
import tracemalloc

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.shards import write_tar

from prelora_ds.data.manifest import EXTENSIONS
from prelora_ds.data.shards.scan import index_shard
from prelora_ds.data.shards.writer import DIGIT_CLASSES, digits, write_shards
from prelora_ds.errors import ConfigError


@pytest.fixture
def shards(tmp_path):
    return write_shards(
        digits("val"), tmp_path / "val", samples_per_shard=100, class_names=DIGIT_CLASSES
    )


def test_a_shard_cut_short_anywhere_is_never_indexed(shards, tmp_path):
    """Python's tarfile, and webdataset on top of it, ends at most of these cuts without an error."""
    data = (shards.folder / "shard-000003.tar").read_bytes()
    used = int((shards.rows["offset"] + shards.rows["length"])[300:].max())
    path = tmp_path / "cut.tar"
    for size in [0, 1, 511, 512, *range(513, used + 512, 1777), used - 1, used]:
        path.write_bytes(data[:size])
        with pytest.raises(ConfigError, match=r"cut\.tar"):
            index_shard(path)


def test_a_flipped_bit_in_any_header_is_never_skipped(shards, tmp_path):
    data = (shards.folder / "shard-000003.tar").read_bytes()
    path = tmp_path / "flipped.tar"
    for sample in shards.rows[300::7]:
        damaged = bytearray(data)
        damaged[sample["offset"] - 512 + 130] ^= 1  # in the header of the image, its size
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"flipped\.tar"):
            index_shard(path)


def test_other_members_folders_and_long_names_are_accepted(tmp_path):
    long = "x" * 200
    members = [
        ("readme", b"text"),
        ("a/notes.txt", b"text"),
        ("a/1.cls", b"3"),
        ("a/1.JPG", b"jpeg"),
        ("a/1.json", b"{}"),
        ("b.d/1.png", b"png"),
        ("b.d/1.cls", b"4\n"),
        ("b.d/1.mask.png", b"no"),
        (f"{long}.cls", b"5"),
        (f"{long}.jpg", b"j" * 1000),
    ]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = write_tar(tmp_path / "a.tar", members, format=form)
        scanned, data = index_shard(path), path.read_bytes()
        rows = scanned.rows
        assert scanned.skipped == ("readme", "a/notes.txt")
        assert [(EXTENSIONS[row["extension"]], row["label"]) for row in rows] == [
            ("jpg", 3),
            ("png", 4),
            ("jpg", 5),
        ]
        assert [data[r["offset"] : r["offset"] + r["length"]] for r in rows] == [
            b"jpeg",
            b"png",
            b"j" * 1000,
        ]


@pytest.mark.parametrize(
    "members",
    [
        [("1.jpg", b"image")],
        [("1.cls", b"3")],
        [("1.cls", b"3"), ("1.jpg", b"image"), ("1.png", b"image")],
        [("1.cls", b"three"), ("1.jpg", b"image")],
        [("1.cls", b"3"), ("1.jpg", b"")],
        [("1.cls", b"3"), ("2.cls", b"3"), ("1.jpg", b"image"), ("2.jpg", b"image")],
    ],
)
def test_a_sample_that_is_not_one_image_and_one_label_is_refused(tmp_path, members):
    with pytest.raises(ConfigError, match=r"1\.tar"):
        index_shard(write_tar(tmp_path / "1.tar", members))


def keys_of_webdataset(path):
    """The samples with an image and a label that the webdataset package finds."""
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList([str(path)]), webdataset.tarfile_to_samples()
    )
    return [sample["__key__"] for sample in pipeline if "jpg" in sample and "cls" in sample]


def test_members_that_webdataset_skips_are_skipped_and_reported(tmp_path):
    others = [
        "._1.jpg",
        "._1.cls",
        ".DS_Store",
        "LICENSE",
        "__meta__/info.json",
        "__index__",
        "a/.DS_Store",
        "README.md",
        "__MACOSX/._1.jpg",
        "Makefile",
        "1.",
    ]
    for place in range(4):  # also within a sample, which stays one
        members = [("a/1.jpg", b"x"), ("a/1.cls", b"1"), ("b/1.jpg", b"y"), ("b/1.cls", b"2")]
        inside = [name for name in others if name != "README.md"] if place % 2 else others
        members[place:place] = [(name, b"z") for name in inside]
        path = write_tar(tmp_path / "1.tar", members)
        scanned = index_shard(path)
        assert scanned.rows["label"].tolist() == [1, 2] and set(scanned.skipped) == set(inside)
        if not place % 2:
            assert keys_of_webdataset(path) == ["a/1", "b/1"]


def test_a_shard_with_only_skipped_members_is_empty(tmp_path):
    with pytest.raises(
        ConfigError, match=r"empty.*\(2 members belong to no sample; the first is '\._1\.jpg'\)"
    ):
        index_shard(write_tar(tmp_path / "1.tar", [("._1.jpg", b"x"), ("LICENSE", b"x")]))


def test_a_file_with_holes_is_refused_where_it_is_an_image_or_a_label(tmp_path):
    """The bytes at its place in the tar are not the file."""
    data = bytes(range(256)) * 16
    for name in ("a.jpg", "a.cls", "a.txt"):
        with (tmp_path / name).open("wb") as file:
            file.write(data if name != "a.cls" else b"0")
            file.seek(1 << 20)
            file.write(data if name != "a.cls" else b"\n")
    for name in ("b.jpg", "b.cls"):
        (tmp_path / name).write_bytes(b"0")
    for members, refused in (
        (("a.jpg", "b.cls"), "a.jpg"),
        (("b.jpg", "a.cls"), "a.cls"),
        (("b.jpg", "b.cls", "a.txt"), None),
    ):
        for form in ("gnu", "posix"):
            subprocess.run(
                [
                    "tar",
                    "-S",
                    f"--format={form}",
                    "--transform=s/^[ab]/c/",
                    "-cf",
                    tmp_path / "s.tar",
                    "-C",
                    tmp_path,
                    *members,
                ],
                check=True,
            )
            if refused is None:
                assert len(index_shard(tmp_path / "s.tar").rows) == 1
            else:
                with pytest.raises(
                    ConfigError, match=r"sample 'c': 'c\.\w+' is stored with holes(.|\n)*--sparse"
                ):
                    index_shard(tmp_path / "s.tar")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.FIFOTYPE, "not a file"),
    ],
)
def test_links_and_what_is_not_a_file_are_refused_in_a_sample_and_skipped_elsewhere(
    tmp_path, kind, said
):
    def with_link(name):
        with tarfile.open(tmp_path / "1.tar", "w") as tar:
            for key, data in (("a.jpg", b"x"), ("a.cls", b"0"), ("b.cls", b"0")):
                info = tarfile.TarInfo(key)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
            if name != "b.jpg":
                info = tarfile.TarInfo("b.jpg")
                info.size = 1
                tar.addfile(info, io.BytesIO(b"y"))
        return tmp_path / "1.tar"

    with pytest.raises(ConfigError, match=rf"at byte 2048, sample 'b': 'b\.jpg' is {said}"):
        index_shard(with_link("b.jpg"))
    assert len(index_shard(with_link("b.txt")).rows) == 2  # of a sample, and not its image or label


def test_names_with_dots_and_slashes_are_only_names(tmp_path):
    names = ["../up", "/root/1", "./here", "a/../b"]
    path = write_tar(
        tmp_path / "1.tar",
        [
            member
            for name in names
            for member in ((f"{name}.jpg", name.encode()), (f"{name}.cls", b"0"))
        ],
    )
    assert len(index_shard(path).rows) == len(names)
    assert not (tmp_path.parent / "up.jpg").exists()


def test_tars_joined_by_cat_are_refused(tmp_path):
    """A tar reader stops at the end of the first: webdataset loses all that follows."""
    one = write_tar(tmp_path / "1.tar", [("a.jpg", b"x"), ("a.cls", b"0")])
    two = write_tar(tmp_path / "2.tar", [("b.jpg", b"x"), ("b.cls", b"0")])
    one.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(
        ConfigError, match=r"data follows the end of the archive(.|\n)*not with cat"
    ):
        index_shard(one)


@pytest.mark.parametrize("form", ["gz", "bz2", "xz"])
def test_a_packed_shard_is_named_so(tmp_path, form):
    path = tmp_path / "1.tar"
    with tarfile.open(path, f"w:{form}") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ConfigError, match=r"is compressed with (gzip|bzip2|xz)(.|\n)*unpack"):
        index_shard(path)


def test_a_size_that_lies_asks_for_no_memory(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    (tmp_path / "1.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"1\.tar"):
        index_shard(tmp_path / "1.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_shard_with_any_bytes_changed_is_read_or_refused_in_one_way(tmp_path, data):
    path = tmp_path / "fuzz.tar"
    members = [
        ("a.jpg", b"x" * 600),
        ("a.json", b'{"label": 1, "other": [1]}'),
        ("b" * 120 + ".jpg", b"y"),
        ("b" * 120 + ".cls", b"0"),
        ("c.jpg", b"z"),
        ("c.cls", b"2"),
    ]
    form = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    content = bytearray(write_tar(path, members, format=form).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 8000))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    if data.draw(st.booleans()):  # headers with a right checksum get further
        for start in range(0, len(content) - 512, 512):
            header = content[start : start + 512]
            if header[257:262] == b"ustar":
                header[148:156] = b" " * 8
                content[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        rows = index_shard(path).rows
        assert ((rows["label"] >= 0) & (rows["offset"] + rows["length"] <= len(content))).all()


@pytest.mark.parametrize("members", [
    ("x.1.png", "x.1.cls"),
    ("y.png", "y.cls", "x.1.png", "x.1.json"),
    ("x.png", "x.cls", "x.1.png", "x.1.cls"),
    ("x.1.0.png", "x.1.0.cls"),
    ("a.b/x.1.gif", "a.b/x.1.cls"),
])
def test_a_sample_with_a_dot_in_its_name_is_refused(tmp_path, members):
    path = write_tar(tmp_path / "a.tar", [(name, b"0") for name in members])
    with pytest.raises(ConfigError, match=r"x\.1.*' has a dot in its name.*of the sample '.*x'"):
        index_shard(path)


def test_further_images_of_a_sample_and_their_labels_are_skipped(tmp_path):
    members = [("x.png", b"1"), ("x.cls", b"0"), ("x.seg.png", b"1"), ("x.seg.json", b"{}")]
    assert len(index_shard(write_tar(tmp_path / "a.tar", members)).rows) == 1


@pytest.mark.parametrize(("extension", "remedy"), [
    ("gif", "write the shards again, with this image as PNG"), ("jfif", r"rename the member to \.jpg"),
    ("TIFF", "write the shards again, with this image as PNG"),
])
def test_an_image_of_another_format_is_named(tmp_path, extension, remedy):
    path = write_tar(tmp_path / "a.tar", [(f"0.{extension}", b"1"), ("0.cls", b"0")])
    said = rf"has its image in \.{extension.lower()}, and only jpg, jpeg, png, webp are read\n.*"
    with pytest.raises(ConfigError, match=said + remedy):
        index_shard(path)
