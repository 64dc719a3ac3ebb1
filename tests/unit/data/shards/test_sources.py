"""Each kind of source, as its makers lay it out: every image found once, with its label and its bytes or pixels."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from scipy.io import savemat

from prelora_ds.data.shards.sources import SOURCE_FORMATS, find_images
from prelora_ds.data.shards.sources.listing import Request
from prelora_ds.errors import ConfigError

FASHION = Path("/usr/share/datasets/fashion-mnist")


def picture(number, form="JPEG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def found(source, kind, split=None, labels=None):
    """(classes, [(bytes, label)]) of a source that is recognised as ``kind``."""
    listing = find_images(Request(source, split, labels))
    assert listing.source_format == kind
    read = SOURCE_FORMATS[kind].read
    return listing.classes, [
        (read(listing.files[item["file"]], int(item["offset"]), int(item["length"])), int(item["label"]))
        for item in listing.items
    ]


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def tar(path, members):
    with tarfile.open(path, "w") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def refuse(problem, source, **request):
    with pytest.raises(ConfigError, match=problem):
        find_images(Request(source, request.get("split"), request.get("labels")), request.get("kind"))


def write_tree(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_a_tree_of_folders_has_its_labels_from_the_sorted_names(tmp_path):
    files = {"dog/a.JPEG": picture(1), "dog/sub/b.png": picture(2, "PNG"), "cat/a.jpg": picture(3),
             "cat/c.bmp": picture(4, "BMP"), "cat/notes.txt": b"no image", "README": b"none either"}
    classes, images = found(write_tree(tmp_path / "tree", files), "imagefolder")
    assert classes == ("cat", "dog")
    assert images == [(files["cat/a.jpg"], 0), (files["cat/c.bmp"], 0), (files["dog/a.JPEG"], 1),
                      (files["dog/sub/b.png"], 1)]
    assert find_images(Request(tmp_path / "tree")).skipped == "1 files with .txt"


def test_a_tree_of_splits_asks_for_one(tmp_path):
    root = write_tree(tmp_path, {f"{split}/{name}/1.png": picture(1, "PNG") for split in ("train", "val")
                                 for name in ("cat", "dog")})
    refuse(r"--split = None.*train, val", root)
    refuse(r"--split = 'dog'", root / "train", split="dog")
    assert found(root, "imagefolder", "val")[0] == ("cat", "dog")


def test_sources_that_are_missing_empty_or_of_no_known_format_are_named(tmp_path):
    refuse("nowhere.*no such file or folder", tmp_path / "nowhere")
    refuse("looks like none of", tmp_path)
    refuse("no such format", tmp_path, kind="zip")
    write_tree(tmp_path, {"cat/1.png": picture(1, "PNG"), "dog/notes.txt": b""})
    refuse(r"dog.*this class has no images", tmp_path)
    refuse(r"--labels.*no such file", tmp_path, labels=tmp_path / "none")
    (tmp_path / "file").write_bytes(b"")
    refuse(r"--format = 'idx'", tmp_path / "file", kind="idx")
    for kind in ("idx", "cifar", "huggingface", "ilsvrc2012"):
        refuse("contains none of the files", tmp_path, kind=kind)


WNIDS = ("n01440764", "n02099601", "n03888257")
ILSVRC_ID = {"n01440764": 3, "n02099601": 1, "n03888257": 2}  # another order, as in the real devkit


@pytest.fixture
def ilsvrc(tmp_path):
    """Folder with both tars; the images of train by (wnid, number), of val by number."""
    train = {(wnid, i): picture(10 * k + i) for k, wnid in enumerate(WNIDS) for i in range(3)}
    classes = []
    for wnid in reversed(WNIDS):
        inner = tar(tmp_path / "inner.tar", [(f"{wnid}_{i}.JPEG", train[wnid, i]) for i in range(3)])
        classes.append((f"{wnid}.tar", inner.read_bytes()))
        inner.unlink()
    tar(tmp_path / "ILSVRC2012_img_train.tar", classes)
    val = {i: picture(100 + i) for i in range(1, 5)}
    tar(tmp_path / "ILSVRC2012_img_val.tar", [(f"ILSVRC2012_val_{i:08d}.JPEG", val[i]) for i in (2, 1, 4, 3)])
    return tmp_path, train, val


def devkit(folder, truth):
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{i}\n" for i in truth))
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(i, wnid, "words", 0) for wnid, i in ILSVRC_ID.items()] + [(4, "n00001740", "an inner node", 3)]
    savemat(data / "meta.mat", {"synsets": np.array(rows, kind)})
    return data.parent


def test_the_tar_of_class_tars_is_read_in_place(ilsvrc):
    folder, train, _ = ilsvrc
    classes, images = found(folder / "ILSVRC2012_img_train.tar", "ilsvrc2012")
    assert classes == WNIDS
    assert images == [(train[wnid, i], label) for label, wnid in enumerate(WNIDS) for i in range(3)]
    assert found(folder, "ilsvrc2012", "train") == (classes, images)
    refuse("--split = None.*train, val", folder)


@pytest.mark.parametrize("packed", [False, True])
def test_the_devkits_numbers_become_indices_among_the_sorted_ids(ilsvrc, packed):
    folder, _, val = ilsvrc
    kit, expected = devkit(folder, [3, 1, 2, 2]), list(zip(val.values(), [0, 1, 2, 2], strict=True))
    if packed:
        with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as out:
            out.add(kit, "ILSVRC2012_devkit_t12")
    assert found(folder, "ilsvrc2012", "val") == (WNIDS, expected)  # found beside the tar
    truth = kit / "data" / "ILSVRC2012_validation_ground_truth.txt"
    assert found(folder / "ILSVRC2012_img_val.tar", "ilsvrc2012", None, truth) == (WNIDS, expected)
    (kit / "data" / "meta.mat").unlink()
    refuse(r"not a devkit: both", folder, split="val", labels=truth)


def test_labels_of_val_come_as_ids_as_numbers_or_as_kaggles_table(ilsvrc, tmp_path):
    folder, _, val = ilsvrc
    path, names = tmp_path / "labels.txt", [f"ILSVRC2012_val_{i:08d}" for i in val]
    wanted = [(data, label) for data, label in zip(val.values(), [2, 0, 1, 0], strict=True)]
    ids = [WNIDS[label] for _, label in wanted]
    path.write_text("".join(f"{name}.JPEG {wnid}\n" for name, wnid in zip(names, ids, strict=True)))
    assert found(folder, "ilsvrc2012", "val", path) == (WNIDS, wanted)
    path.write_text("ImageId,PredictionString\n" + "".join(
        f"{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for name, wnid in zip(names, ids, strict=True)))
    assert found(folder, "ilsvrc2012", "val", path) == (WNIDS, wanted)
    path.write_text("".join(f"{name}.JPEG {label}\n" for name, (_, label) in zip(names, wanted, strict=True)))
    assert found(folder, "ilsvrc2012", "val", path) == (None, wanted)
    for text, problem in (("", "4 images have no label, the first is ILSVRC2012_val_00000001"),
                          (f"{names[0]} 1\n{names[0]} 2\n", "line 2.*listed twice"), ("7\n", "line 1.*no label"),
                          (f"{names[0]} dog\n", "line 1.*neither a WordNet id nor a number")):
        path.write_text(text)
        refuse(problem, folder, split="val", labels=path)


def test_labels_of_val_have_to_be_given(ilsvrc):
    refuse(r"--labels = None", ilsvrc[0], split="val")


def test_a_damaged_outer_or_inner_tar_is_refused_with_its_offset(ilsvrc):
    path = ilsvrc[0] / "ILSVRC2012_img_train.tar"
    data = path.read_bytes()
    refuse_after = {"inner": bytearray(data), "outer": bytearray(data)}
    with tarfile.open(path) as outer:
        second = outer.getmembers()[1]
    refuse_after["inner"][second.offset_data + 512 + 1024 + 130] ^= 1  # the size in the header of its second image
    refuse_after["outer"][second.offset + 130] ^= 1
    for damaged in refuse_after.values():
        path.write_bytes(damaged)
        refuse(r"ILSVRC2012_img_train\.tar.*as a whole tar.*(byte \d+)", path)
    for size in (len(data) - 10240, len(data) // 2, 700):
        path.write_bytes(data[:size])
        refuse(r"as a whole tar|looks like none", path)


def cifar_pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def assert_cifar(images, arrays, labels):
    assert [label for _, label in images] == labels
    for (data, _), array in zip(images, arrays, strict=True):
        assert np.array_equal(pixels(data), array.reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("binary", [False, True])
def test_cifar_10_in_both_versions(tmp_path, binary):
    arrays, labels, names = cifar_pixels(9), [3, 1, 4, 1, 5, 9, 2, 6, 5], [f"class {i}" for i in range(10)]
    for number, part in enumerate(map(slice, range(0, 10, 2), range(2, 12, 2)), 1):
        if binary:
            record = np.concatenate([np.array(labels[part], np.uint8)[:, None], arrays[part]], axis=1)
            (tmp_path / f"data_batch_{number}.bin").write_bytes(record.tobytes())
        else:
            batch = {b"batch_label": b"x", b"labels": labels[part], b"data": arrays[part]}
            (tmp_path / f"data_batch_{number}").write_bytes(pickle.dumps(batch, protocol=2))
    if binary:
        (tmp_path / "batches.meta.txt").write_bytes("\r\n".join(names).encode() + b" \n\n")
    else:  # str keys, as the files of the makers have under the encoding latin1
        for path in tmp_path.iterdir():
            content = pickle.loads(path.read_bytes())
            path.write_bytes(pickle.dumps({key.decode(): value for key, value in content.items()}, protocol=2))
        (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    classes, images = found(tmp_path, "cifar")
    assert classes == tuple(names)
    assert_cifar(images, arrays, labels)


@pytest.mark.parametrize("binary", [False, True])
def test_cifar_100_takes_the_fine_labels(tmp_path, binary):
    arrays, fine, coarse = cifar_pixels(3), [42, 7, 99], [1, 2, 3]
    for name in ("train", "test"):
        if binary:
            record = np.concatenate([np.array([coarse, fine], np.uint8).T, arrays], axis=1)
            (tmp_path / f"{name}.bin").write_bytes(record.tobytes())
        else:
            (tmp_path / name).write_bytes(pickle.dumps({"fine_labels": fine, "coarse_labels": coarse, "data": arrays}))
    names = [f"class{i}" for i in range(100)]
    (tmp_path / "fine_label_names.txt").write_text("\n".join(names)) if binary else \
        (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    refuse("--split = None", tmp_path)
    classes, images = found(tmp_path, "cifar", "test")
    assert classes == tuple(names)
    assert_cifar(images, arrays, fine)


def test_a_batch_exactly_as_in_the_published_files(tmp_path):
    """Python 2 and NumPy 1 pickled it like this: byte strings, and NumPy's module by its old name."""
    array = cifar_pixels(2)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    (tmp_path / "test_batch").write_bytes(
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02M\x00\x0c\x86"
        + dtype + b"\x89T" + struct.pack("<I", array.nbytes) + array.tobytes() + b"tbsU\x06labels](K\x06K\x03es.")
    (tmp_path / "batches.meta").write_bytes(b"\x80\x02}U\x0blabel_names](U\x03catU\x03doges.")
    classes, images = found(tmp_path, "cifar")
    assert classes == ("cat", "dog")
    assert_cifar(images, array, [6, 3])


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path(self.place),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run_it(tmp_path):
    trap = Malicious()
    Malicious.place = str(tmp_path / "ran")
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"labels": [0], "data": trap}))
    refuse(r"data_batch_1.*it asks for pathlib\.", tmp_path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"labels": [0, 1], "data": cifar_pixels(1)}))
    refuse("for 2 labels", tmp_path)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"labels": [0], "data": cifar_pixels(1)})[:-900])
    refuse("as a batch of CIFAR", tmp_path)
    (tmp_path / "data_batch_1").unlink()
    (tmp_path / "test_batch.bin").write_bytes(bytes(3074))
    refuse("not a whole number of records", tmp_path)


def write_idx(path, array):
    data = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_packed_or_plain(tmp_path, suffix):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([4, 0, 2, 2, 1], np.uint8)
    for split in ("train", "t10k"):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{suffix}", labels)
    classes, read = found(tmp_path, "idx", "test")
    assert classes is None and [label for _, label in read] == labels.tolist()
    assert all(np.array_equal(pixels(data), image) for (data, _), image in zip(read, images, strict=True))
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", labels[:4])
    refuse(r"images of shape \(5, 28, 28\), labels of shape \(4,\)", tmp_path, split="train")
    (tmp_path / f"train-images-idx3-ubyte{suffix}").write_bytes((tmp_path / f"train-images-idx3-ubyte{suffix}")
                                                                .read_bytes()[:-100])
    refuse(r"do not match the shape|cut short|cannot be read", tmp_path, split="train")
    (tmp_path / f"train-images-idx3-ubyte{suffix}").unlink()
    refuse("only the labels", tmp_path, split="train")


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_debians_fashion_mnist():
    _, images = found(FASHION, "idx", "test")
    assert len(images) == 10_000 and np.bincount([label for _, label in images]).tolist() == [1000] * 10
    assert pixels(images[0][0]).shape == (28, 28) and images[0][1] == 9  # an ankle boot


FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}


def table(rows, features=FEATURES):
    """What `datasets` writes for (bytes, path, label)."""
    image = pa.array([{"bytes": data, "path": path} for data, path, _ in rows],
                     pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    made = pa.table({"image": image, "label": pa.array([label for *_, label in rows], pa.int64())})
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def save_arrow(path, made):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
        writer.write_table(made, max_chunksize=3)


def save_to_disk(folder, parts):
    folder.mkdir(parents=True)
    for number, rows in enumerate(parts):
        save_arrow(folder / f"data-{number:05d}.arrow", table(rows))
    (folder / "state.json").write_text(json.dumps(
        {"_data_files": [{"filename": f"data-{n:05d}.arrow"} for n in range(len(parts))], "_split": "train"}))


ROWS = [(picture(i), None, i % 3) for i in range(11)]


def test_a_hugging_face_folder_of_arrow(tmp_path):
    save_to_disk(tmp_path / "train", [ROWS[:7], ROWS[7:]])
    save_to_disk(tmp_path / "test", [ROWS[:2]])
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    expected = (("cat", "dog", "eel"), [(data, label) for data, _, label in ROWS])
    assert found(tmp_path, "huggingface", "train") == expected
    assert found(tmp_path / "train", "huggingface") == expected
    refuse("--split = None.*test, train", tmp_path)


def test_a_hugging_face_folder_of_parquet(tmp_path):
    (tmp_path / "data").mkdir()
    for number, rows in enumerate((ROWS[:7], ROWS[7:])):
        path = tmp_path / "data" / f"train-{number:05d}-of-00002.parquet"
        pa.parquet.write_table(table(rows), path, row_group_size=3)
    pa.parquet.write_table(table(ROWS[:1]), tmp_path / "data" / "validation-00000-of-00001-0123abcd.parquet")
    assert found(tmp_path, "huggingface", "train")[1] == [(data, label) for data, _, label in ROWS]
    assert len(found(tmp_path, "huggingface", "validation")[1]) == 1
    listing = find_images(Request(tmp_path, "train"))
    assert listing.items["block"].tolist() == [0, 0, 0, 1, 1, 1, 2, 0, 0, 0, 1]


def test_the_datasets_library_writes_what_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra dev")
    datasets.disable_progress_bars()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog", "eel"]))
    made = datasets.Dataset.from_dict({"image": [{"bytes": data, "path": None} for data, *_ in ROWS],
                                       "label": [label for *_, label in ROWS]}, features=features)
    made.shuffle(seed=0).save_to_disk(tmp_path / "disk", num_shards=2)
    made.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet", batch_size=4)
    shuffled = [(row["image"]["bytes"], row["label"]) for row in
                made.shuffle(seed=0).cast_column("image", datasets.Image(decode=False))]
    assert found(tmp_path / "disk", "huggingface") == (("cat", "dog", "eel"), shuffled)
    assert found(tmp_path / "parquet", "huggingface")[1] == [(data, label) for data, _, label in ROWS]


def test_arrow_images_next_to_the_file_and_rows_without_image_or_label(tmp_path):
    save_to_disk(tmp_path / "a", [[(None, "1.jpg", 1), (None, None, 0)]])
    (tmp_path / "a" / "1.jpg").write_bytes(picture(1))
    listing = find_images(Request(tmp_path / "a"))
    assert SOURCE_FORMATS["huggingface"].read(listing.files[0], 0, 1) == picture(1)
    with pytest.raises(ValueError, match="no image in this row"):
        SOURCE_FORMATS["huggingface"].read(listing.files[0], 1, 1)
    save_to_disk(tmp_path / "b", [[(picture(1), None, None)]])
    refuse(r"data-00000\.arrow.*row 0 has no label", tmp_path / "b")
    save_to_disk(tmp_path / "c", [ROWS])
    data = tmp_path / "c" / "data-00000.arrow"
    data.write_bytes(data.read_bytes()[:-700])
    refuse(r"data-00000\.arrow.*cannot be read", tmp_path / "c")
