"""Files and folders that are whole or not there."""

from __future__ import annotations

import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from prelora_ds.files import new_folder, replace_file


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("data", ["text é\n", b"\0bytes", memoryview(b"view")])
def test_a_file_is_replaced_by_what_was_given_and_nothing_else_is_left(
    tmp_path: Path, data: str | bytes | memoryview, durable: bool
) -> None:
    path = tmp_path / ".hidden.json"
    path.write_text("old")
    replace_file(path, data, durable=durable)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else bytes(data))
    assert list(tmp_path.iterdir()) == [path]


def test_a_script_can_be_run(tmp_path: Path) -> None:
    replace_file(tmp_path / "job.sh", "#!/bin/sh\nexit 7\n", executable=True)
    assert subprocess.run([tmp_path / "job.sh"], check=False).returncode == 7


def test_the_mode_of_a_file_is_that_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    replace_file(tmp_path / "replaced", "")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    try:
        replace_file(disk / "file", "old")
        with pytest.raises(OSError, match="No space"):
            replace_file(disk / "file", bytes(1 << 16))
        with pytest.raises(OSError, match="No space"), new_folder(disk / "folder", replace=True) as partial:
            (partial / "large").write_bytes(bytes(1 << 16))
        assert [path.name for path in disk.iterdir()] == ["file"]
        assert (disk / "file").read_text() == "old"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_reader_never_finds_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([number]) * 100_000 for number in range(2)]
    replace_file(path, contents[0])
    ended = threading.Event()

    def write() -> None:
        for number in range(200):
            replace_file(path, contents[number % 2], durable=False)
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not ended.is_set():
        assert path.read_bytes() in contents
    writer.join()


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep/folder"
    with new_folder(folder, replace=True) as partial:
        (partial / "a").write_text("1")
        assert not folder.exists()
    assert (folder / "a").read_text() == "1"
    with new_folder(folder, replace=True) as partial:
        (partial / "b").write_text("2")
    assert os.listdir(folder) == ["b"]


def test_a_folder_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with new_folder(folder, replace=True) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), new_folder(folder, replace=True) as partial:
        (partial / "a").write_text("2")
        raise KeyboardInterrupt
    assert (folder / "a").read_text() == "1" and os.listdir(tmp_path) == ["folder"]


def test_two_writers_of_one_folder_do_not_take_each_others_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(OSError, match="not empty"), new_folder(folder, replace=False) as mine:
        with new_folder(folder, replace=False) as theirs:
            (theirs / "a").write_text("theirs")
        (mine / "a").write_text("mine")
    assert (folder / "a").read_text() == "theirs" and os.listdir(tmp_path) == ["folder"]


def test_what_a_kill_left_of_a_folder_is_removed_by_its_only_writer(tmp_path: Path) -> None:
    (tmp_path / ".folder.0123.partial").mkdir()
    (tmp_path / ".folder2.0123.partial").mkdir()
    with new_folder(tmp_path / "folder", replace=True):
        pass
    assert sorted(os.listdir(tmp_path)) == [".folder2.0123.partial", "folder"]
