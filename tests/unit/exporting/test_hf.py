"""What is said where the folder of a model cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from prelora_ds.errors import NotSavedError
from prelora_ds.exporting.hf import left_by_run, whole_folder


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_in_the_place_of_the_folder_is_told_as_what_it_is(tmp_path: Path, kind: str, replace: bool) -> None:
    path = tmp_path / "model"
    path.symlink_to(tmp_path) if kind == "link" else path.write_text("notes")
    with pytest.raises(NotSavedError) as refused, whole_folder(path, replace=replace):
        raise AssertionError
    said = str(refused.value)
    assert f"there is a {kind} of that name" in said and "remove or rename it" in said and "make room" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(("number", "remedy"), [
    (errno.ENOSPC, "make room there and give"), (errno.EACCES, "make it a place that you may write to and give"),
])
def test_only_a_disk_that_is_full_wants_room(tmp_path: Path, number: int, remedy: str) -> None:
    with pytest.raises(NotSavedError, match=f"remedy: {remedy} the same command again; as it was"), \
            whole_folder(tmp_path / "model", replace=True, kept="as it was"):
        raise OSError(number, os.strerror(number))


def test_a_run_without_a_checkpoint_is_not_said_to_have_them_as_they_were(tmp_path: Path) -> None:
    assert left_by_run(tmp_path) == "no checkpoint was written, so it trains from the beginning"
    for step in (10, 20):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert left_by_run(tmp_path) == "it goes on from step-00000020"
