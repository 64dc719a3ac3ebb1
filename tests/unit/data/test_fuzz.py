"""Mutations of valid files: each is read rightly, or refused with the documented error."""

from __future__ import annotations

import io
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.memory import small_memory

from prelora_ds.data.decode import MAX_PIXELS, UndecodableError, decode
from prelora_ds.data.manifest import EXTENSIONS, INDEX_NAME, MANIFEST_NAME, Manifest
from prelora_ds.data.rows import ROW
from prelora_ds.data.shards.writer import DIGIT_CLASSES, digits, write_shards
from prelora_ds.errors import ConfigError

MANY = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def mutated(draw: Any, data: bytes) -> bytes:
    """``data`` with a few bytes changed, put in, taken out or moved, or with its end cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(changed)))
        kind = draw(st.sampled_from(["flip", "set", "insert", "delete", "cut", "copy"]))
        if kind == "flip" and place < len(changed):
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            new = draw(st.binary(min_size=1, max_size=4))
            changed[place : place + len(new)] = new
        elif kind == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del changed[place : place + draw(st.integers(1, 16))]
        elif kind == "cut":
            del changed[max(place, 1) :]
        else:
            there = draw(st.integers(0, len(changed)))
            changed[place:place] = changed[there : there + 40]
    return bytes(changed)


# ---- images


def encoded(form: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((40, 30)).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


IMAGES = {
    "jpeg": encoded("JPEG"),
    "grey jpeg": encoded("JPEG", "L"),
    "cmyk jpeg": encoded("JPEG", "CMYK"),
    "progressive jpeg": encoded("JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
    "png": encoded("PNG"),
    "palette png": encoded("PNG", "P", transparency=1),
    "grey png": encoded("PNG", "LA"),
    "deep png": encoded("PNG", "I;16"),
    "one-bit png": encoded("PNG", "1"),
    "webp": encoded("WEBP"),
    "lossless webp": encoded("WEBP", lossless=True),
    "alpha webp": encoded("WEBP", "RGBA", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
}


def tall(form: str, size: tuple[int, int]) -> bytes:
    """A small file whose header says ``size``."""
    width, height = size
    data = bytearray(IMAGES[form])
    if "jpeg" in form:
        place = data.index(b"\xff\xc2" if "progressive" in form else b"\xff\xc0")
        data[place + 5 : place + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    elif "png" in form:
        data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    elif data[12:16] == b"VP8X":
        data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif data[12:16] == b"VP8L":
        data[21:25] = (
            int.from_bytes(data[21:25], "little") & ~0xFFFFFFF | width - 1 | height - 1 << 14
        ).to_bytes(4, "little")
    else:
        data[26:30] = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    return bytes(data)


@settings(MANY, max_examples=1000)
@given(
    data=st.sampled_from(sorted(IMAGES)).flatmap(lambda name: mutated(IMAGES[name])),
    channels=st.sampled_from([1, 3]),
)
@example(b"", 3)
@example(b"\xff\xd8", 3)
def test_changed_bytes_of_an_image_are_decoded_or_undecodable(data, channels):
    try:
        pixels = decode(data, channels)
    except UndecodableError as error:
        assert str(error) and "0x" not in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == channels
        assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS


@pytest.mark.parametrize("form", sorted(IMAGES))
def test_a_header_of_too_many_pixels_is_refused_before_memory_is_asked_for(form):
    size = (16_383, 16_383) if "webp" in form else (65_376, 65_408)
    with small_memory():
        for channels in (1, 3):
            with pytest.raises(
                UndecodableError,
                match=rf"{size[0]} x {size[1]} pixels, and at most 178,956,970|"
                r"exceeds limit",
            ):
                decode(tall(form, size), channels)
            assert decode(IMAGES[form], channels).shape == (30, 40, channels)


# ---- the manifest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_shards(
        digits("val"),
        tmp_path_factory.mktemp("whole") / "val",
        samples_per_shard=150,
        class_names=DIGIT_CLASSES,
    )


@pytest.fixture
def folder(whole: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.folder, tmp_path / "val"))


def load_or_refuse(folder: Path, whole: Manifest) -> None:
    """What is read points at bytes that are there, and has classes."""
    try:
        manifest = Manifest.load(folder)
    except ConfigError as error:
        assert (error.exit_code, error.key) == (2, "data.train")
        return
    rows, sizes = manifest.rows, np.array([shard.size_bytes for shard in manifest.shards])
    assert len(rows) == len(manifest) == sum(shard.samples for shard in manifest.shards) > 0
    assert (rows["offset"] >= 0).all()
    assert (rows["offset"].astype(object) + rows["length"] <= sizes[rows["shard"]]).all()
    assert (rows["label"] >= 0).all() and (rows["label"] < len(manifest.classes)).all()
    assert (rows["extension"] < len(EXTENSIONS)).all()
    assert tuple(rows[7].item()) == manifest.index.row(7)


@MANY
@given(data=st.data())
def test_changed_bytes_of_manifest_json_are_read_or_refused(whole, folder, data):
    (folder / MANIFEST_NAME).write_bytes(
        data.draw(mutated((whole.folder / MANIFEST_NAME).read_bytes()))
    )
    load_or_refuse(folder, whole)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        ["..", "/", "a/b", "", "\0", "\ud800", "x" * 300, [], {}, [[]], {"name": 1}, "9" * 20]
    ),
)


@MANY
@given(data=st.data())
def test_other_values_in_manifest_json_are_read_or_refused(whole, folder, data):
    content = json.loads((whole.folder / MANIFEST_NAME).read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        places = (
            [content, *content["shards"]] if isinstance(content.get("shards"), list) else [content]
        )
        place = data.draw(st.sampled_from([p for p in places if isinstance(p, dict)]))
        key = data.draw(st.sampled_from(sorted({*place, "base", "label_key"})))
        if data.draw(st.integers(0, 4)) == 0:
            place.pop(key, None)
        elif key == "classes" and data.draw(st.booleans()):
            place[key] = [data.draw(ODD) for _ in range(10)]
        else:
            place[key] = data.draw(ODD)
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    load_or_refuse(folder, whole)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        '"x"',
        "[" * 100_000,
        "{" * 1000,
        '{"version": 2}',
        '{"version": 1' + "0" * 5000 + "}",
    ],
)
def test_json_that_is_not_a_manifest_is_refused(folder, whole, text):
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(ConfigError, match="invalid manifest"):
        Manifest.load(folder)


@MANY
@given(data=st.data())
def test_changed_bytes_of_index_npy_are_read_or_refused(whole, folder, data):
    """Also where its checksum is right: the content alone decides then."""
    index = (whole.folder / INDEX_NAME).read_bytes()
    head, body = index[: -whole.rows.nbytes], index[-whole.rows.nbytes :]
    if data.draw(st.booleans()):
        changed = data.draw(mutated(head)) + body
    else:
        rows = np.frombuffer(body, ROW).copy()
        for _ in range(data.draw(st.integers(1, 3))):
            row, name = (
                data.draw(st.integers(0, len(rows) - 1)),
                data.draw(st.sampled_from(ROW.names)),
            )
            limits = np.iinfo(ROW[name])
            rows[name][row] = data.draw(
                st.one_of(
                    st.integers(0, 10),
                    st.sampled_from([limits.min, limits.max]),
                    st.integers(int(limits.min), int(limits.max)),
                )
            )
        changed = head + rows.tobytes()
    (folder / INDEX_NAME).write_bytes(changed)
    content = json.loads((whole.folder / MANIFEST_NAME).read_bytes())
    if data.draw(st.integers(0, 3)):
        content["index_crc32"] = zlib.crc32(changed)
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    load_or_refuse(folder, whole)


@pytest.mark.parametrize("name", [MANIFEST_NAME, INDEX_NAME])
def test_a_folder_in_place_of_a_file_is_refused(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ConfigError, match=rf"data\.train = .*{name}.*cannot be read"):
        Manifest.load(folder)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\udce9", "file/below"])
def test_a_folder_that_cannot_be_is_refused(folder, name):
    (folder / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.train = "):
        Manifest.load(folder / name)
