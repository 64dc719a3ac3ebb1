"""`prelora shards index` and `verify` as a user sees them: what is said, and the exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from support.shards import picture, write_tar

from prelora_ds.cli import main


def shards(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `prelora shards`."""
    words = [str(word) for word in ("prelora", "shards", *arguments, "--workers", "1")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_what_is_skipped_and_classes_without_a_sample_are_reported(monkeypatch, capsys, tmp_path):
    members = [("._a.jpg", b"x"), ("LICENSE", b"x"), ("a.jpg", picture(1)), ("a.cls", b"2")]
    write_tar(tmp_path / "x" / "0.tar", [*members, ("a.pkl", b"x")])
    assert shards(monkeypatch, "index", tmp_path / "x") == 0
    said = capsys.readouterr()
    where = tmp_path / "x"
    assert f"{where}: 1 samples of 3 classes in 1 shards; 2 classes have no sample\n" in said.out
    assert f"{where}: 2 members that belong to no sample were skipped; the first is '._a.jpg'\n" in said.err
    assert f"{where}: 1 pickled members were skipped (never decoded)\n" in said.err


def test_decode_lists_what_cannot_be_decoded_and_ends_with_1(monkeypatch, capsys, tmp_path):
    members = [("a.jpg", picture(1)), ("a.cls", b"0"), ("b.jpg", b"<html>"), ("b.cls", b"1")]
    write_tar(tmp_path / "0.tar", members)
    assert shards(monkeypatch, "index", tmp_path) == 0
    assert shards(monkeypatch, "verify", tmp_path) == 0
    assert "all shards match the manifest\n" in capsys.readouterr().out
    assert shards(monkeypatch, "verify", tmp_path, "--decode") == 1
    said = capsys.readouterr().out
    offset = 512 + (-(-len(members[0][1]) // 512)) * 512 + 1024 + 512
    assert f"0.tar, sample 1, byte {offset}: the image (6 bytes) cannot be decoded: " in said
    assert "1 shards have problems" in said


@pytest.mark.parametrize("arguments", [
    ("index", "{0}/none-{{0..3}}.tar", "--out", "{0}/out"),
    ("index", "{0}/x", "--classes", "{0}/latin"),
    ("index", "{0}/x", "--like", "{0}/x"),
    ("index", "{0}/x", "--label-key", "other"),
    ("verify", "{0}/x", "--decode"),
    ("verify", "{0}/x/0.tar"),
])
def test_a_mistake_is_one_message_with_a_remedy_and_exit_code_2(monkeypatch, capsys, tmp_path,
                                                                arguments: tuple[str, ...]):
    label = json.dumps({"label": "crane"}).encode()
    write_tar(tmp_path / "x" / "0.tar", [("a.jpg", picture(1)), ("a.json", label)])
    (tmp_path / "latin").write_bytes(b"crane\ncaf\xe9\n")
    assert shards(monkeypatch, *(word.format(tmp_path) for word in arguments)) == 2
    said = capsys.readouterr().err.replace("\r", "\n")
    assert said.count("error: ") == said.count("\n  remedy: ") == 1 and "Traceback" not in said
    assert not Path(tmp_path / "x" / "manifest.json").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_message_and_75_and_the_same_command_succeeds_later(monkeypatch, capsys,
                                                                                tmp_path, small_disk):
    members = [member for number in range(400)
               for member in ((f"{number}.jpg", b"x"), (f"{number}.cls", b"0"))]
    write_tar(tmp_path / "x" / "0.tar", members)
    command = ("index", tmp_path / "x", "--out", small_disk)
    assert shards(monkeypatch, *command) == 75
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "cannot be written there (No space left on device)" in said
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=1m,ro", small_disk], check=True)
    assert shards(monkeypatch, *command) == 2
    assert "cannot be written there (Read-only file system)" in capsys.readouterr().err
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert shards(monkeypatch, *command) == 0


@pytest.mark.parametrize(("labels", "classes", "empty"), [([1, 2], 3, 1), ([0, 999], 1000, 998), ([0, 1], 2, 0)])
def test_a_build_reports_how_many_classes_have_no_sample(monkeypatch, capsys, tmp_path, labels, classes, empty):
    (tmp_path / "in").mkdir()
    table = pyarrow.table({"image": [picture(1), picture(2)], "label": labels})
    pyarrow.parquet.write_table(table, tmp_path / "in" / "train.parquet")
    assert shards(monkeypatch, "build", tmp_path / "in", tmp_path / "out") == 0
    without = f"; {empty} classes have no sample" if empty else ""
    assert capsys.readouterr().out.endswith(f"out: 2 samples of {classes} classes in 1 shards{without}\n")


def test_a_class_that_skip_bad_has_emptied_is_counted(monkeypatch, capsys, tmp_path):
    for name, data in (("cat", picture(1)), ("dog", b"broken")):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.jpg").write_bytes(data)
    assert shards(monkeypatch, "build", tmp_path / "in", tmp_path / "out", "--skip-bad") == 0
    assert "1 samples of 2 classes in 1 shards; 1 classes have no sample\n" in capsys.readouterr().out
