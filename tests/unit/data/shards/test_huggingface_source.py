"""Configurations, parts and columns of Parquet and Arrow, and one message for each fault."""

from __future__ import annotations

import json

import pytest
from support.sources import found, parquet, picture, refusal

from prelora_ds.data.shards.sources import find_images
from prelora_ds.data.shards.sources.listing import Request


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
    assert "the split train exists 2 times, in the folders 320px, full_size" in said
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
        ({"labels": [9_999_999_999, 0, 0, 0], "metadata": ""}, "labels range from 0 to 9999999999"),
        ({"labels": [1_500_000_000, 0, 0, 0], "metadata": ""}, "at most 1,000,000 classes"),
        ({"metadata": "{"}, "its Hugging Face metadata has no info.features (JSONDecodeError("),
        ({"metadata": "[]"}, "its Hugging Face metadata has no info.features (TypeError("),
        ({"metadata": "{}"}, "its Hugging Face metadata has no info.features (KeyError('info')"),
        ({"metadata": '{"info": {"features": [1]}}'},
         "info.features of its Hugging Face metadata is not a mapping"),
        ({"metadata": '{"info": {"features": {"img": {"_type": "Image"}}}}'},
         "its metadata names a column 'img', and it has the columns image, label"),
        ({"metadata": '{"info": {"features": {"y": {"_type": "ClassLabel", "names": ["a"]}}}}'},
         "its metadata names a column 'y', and it has the columns image, label"),
        ({"names": "ab"}, "the ClassLabel 'label' has the names 'ab', which are not a list"),
        ({"names": {"a": 0, "b": 1}}, "which are not a list"),
        ({"names": ["a", "a"]}, "'a' occurs twice"),
    ],
)
def test_columns_that_hold_something_else_are_reported_with_their_type(tmp_path, settings, problem):
    parquet(tmp_path / "train.parquet", **settings)
    said = refusal(tmp_path)
    assert problem in said and str(tmp_path) in said


@pytest.mark.parametrize("stray", ["metadata.parquet", "cat/deep/index.parquet", "state.json"])
def test_a_stray_file_does_not_replace_a_tree_of_classes(tmp_path, stray):
    for name in ("cat", "dog"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "1.jpg").write_bytes(picture(1))
    parquet(tmp_path / stray)
    said = refusal(tmp_path)
    assert f"contains {stray}, which has the format huggingface, and cat/deep/1.jpg" in said
    assert "--format huggingface or --format imagefolder" in said
    listing = find_images(Request(tmp_path), "imagefolder")
    assert listing.classes == ("cat", "dog") and len(listing.items) == 2


def test_parquet_files_next_to_class_folders_are_read_where_the_format_is_given(tmp_path):
    parquet(tmp_path / "data" / "train.parquet")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "logo.png").write_bytes(picture(1, "PNG"))
    assert "assets/logo.png" in refusal(tmp_path)
    assert len(find_images(Request(tmp_path), "huggingface").items) == 4
