"""The errors when the folder of a model cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from prelora_ds.errors import NotSavedError
from prelora_ds.exporting.hf import export_folder, resume_hint


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_link_in_the_place_of_the_folder_is_reported_as_such(
    tmp_path: Path, kind: str, replace: bool
) -> None:
    path = tmp_path / "model"
    path.symlink_to(tmp_path) if kind == "link" else path.write_text("notes")
    with pytest.raises(NotSavedError) as refused, export_folder(path, replace=replace):
        raise AssertionError
    said = str(refused.value)
    assert f"there is a {kind} with this name" in said and "remove or rename it" in said and "free space" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(("number", "remedy"), [
    (errno.ENOSPC, "free space there and run"), (errno.EACCES, "make it writable and run"),
])
def test_only_a_full_disk_asks_for_space(tmp_path: Path, number: int, remedy: str) -> None:
    with pytest.raises(NotSavedError, match=f"remedy: {remedy} the same command again; as it was"), \
            export_folder(tmp_path / "model", replace=True, fallback="as it was"):
        raise OSError(number, os.strerror(number))


def test_the_hint_names_the_newest_checkpoint_if_there_is_one(tmp_path: Path) -> None:
    assert resume_hint(tmp_path) == "no checkpoint was written, so the run starts from the beginning"
    for step in (10, 20):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert resume_hint(tmp_path) == "the run resumes from step-00000020"
