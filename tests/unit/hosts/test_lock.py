"""The lock of an output folder: who holds it, when the holder counts as dead, and who takes over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prelora_ds.errors import LaunchError
from prelora_ds.hosts import lock as lock_module
from prelora_ds.hosts.lock import Lock

NAME = ".lease"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "RENEWED_EVERY_S", 0.05)
    monkeypatch.setattr(lock_module, "DEAD_AFTER_S", 0.6)


def left_behind(folder: Path, **changes: object) -> None:
    """A lock as another process would have left it."""
    lock = Lock(folder / NAME)
    (folder / NAME).write_text(json.dumps(json.loads(lock._text(0)) | changes))


def test_a_living_job_holds_its_folder_and_the_message_names_it(tmp_path: Path) -> None:
    first = Lock(tmp_path / NAME).take()
    with pytest.raises(LaunchError, match=f"is in use by process {os.getpid()} on .*\n  remedy: end that job"):
        Lock(tmp_path / NAME).take()
    first.release()
    assert not (tmp_path / NAME).exists()
    Lock(tmp_path / NAME).take().release()


def test_the_lock_of_a_killed_process_of_this_machine_is_taken_without_waiting(tmp_path: Path) -> None:
    code = (f"from pathlib import Path; import os; from prelora_ds.hosts.lock import Lock; "
            f"Lock(Path({str(tmp_path / NAME)!r})).take(); os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert (tmp_path / NAME).exists()
    begun = time.monotonic()
    Lock(tmp_path / NAME).take().release()
    assert time.monotonic() - begun < 0.5


def test_a_process_of_another_pid_namespace_counts_as_dead_only_after_the_wait(tmp_path: Path) -> None:
    """In a container a process number means another process, or none."""
    left_behind(tmp_path, processes="pid:[1]", pid=2**22 - 1)
    begun = time.monotonic()
    Lock(tmp_path / NAME).take().release()
    assert time.monotonic() - begun >= 0.6  # it was watched before it was given up


def test_the_lock_of_another_host_counts_while_it_changes_and_not_after(tmp_path: Path) -> None:
    left_behind(tmp_path, host="elsewhere", boot="other")
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.1):
            left_behind(tmp_path, host="elsewhere", boot="other", renewals=time.monotonic())

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(LaunchError, match=r"is in use by process .* on elsewhere"):
            Lock(tmp_path / NAME).take()
    finally:
        ended.set()
        thread.join()
    begun = time.monotonic()
    Lock(tmp_path / NAME).take().release()
    assert time.monotonic() - begun >= 0.6


def test_a_process_number_that_was_reused_is_not_the_holder(tmp_path: Path) -> None:
    left_behind(tmp_path, born="1")
    lock = Lock(tmp_path / NAME).take()
    assert json.loads((tmp_path / NAME).read_text())["born"] not in (None, "1") and lock.check() is None
    lock.release()


def test_a_job_that_was_considered_dead_learns_of_it_and_leaves_the_new_lock_untouched(tmp_path: Path) -> None:
    frozen = Lock(tmp_path / NAME).take()
    assert frozen.check() is None
    left_behind(tmp_path, token="new", host="elsewhere")
    time.sleep(0.2)
    code, why = frozen.check() or (0, "")
    assert code == 88 and "taken over by process" in why and "elsewhere" in why
    frozen.release()
    assert json.loads((tmp_path / NAME).read_text())["token"] == "new"


def test_a_lock_that_is_not_json_has_no_holder(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("")
    lock = Lock(tmp_path / NAME).take()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid() and lock.check() is None
    lock.release()


@pytest.mark.parametrize("text", [
    '{"token": "x"}', '{"token": null, "pid": {}}', '{"token": 7, "host": [], "pid": "../1"}'])
def test_a_lock_with_other_content_belongs_to_another_job(tmp_path: Path, text: str) -> None:
    lock = Lock(tmp_path / NAME).take()
    (tmp_path / NAME).write_text(text)
    code, why = lock.check() or (0, "")
    assert code == 88 and "was taken over by process" in why
    lock.release()
    assert (tmp_path / NAME).read_text() == text


@pytest.mark.parametrize("content", [
    "[]", "[" * 100_000, '{"token": "x"}', "{this machine}", '{"pid": "\\u0000", "born": "1", {this machine}'])
def test_a_lock_that_names_no_process_has_no_holder_once_it_stops_changing(tmp_path: Path, content: str) -> None:
    left_behind(tmp_path)
    mine = json.loads((tmp_path / NAME).read_text())
    machine = json.dumps({"host": mine["host"], "boot": mine["boot"]})
    (tmp_path / NAME).write_text(content.replace("{this machine}", machine if content[1] == "t" else machine[1:]))
    Lock(tmp_path / NAME).take().release()


def test_a_removed_or_moved_folder_ends_the_job_with_75_and_is_not_created_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    lock = Lock(out / NAME).take()
    out.rename(tmp_path / "elsewhere")
    assert lock.check() is None, "one failed check may be a hiccup of the disk"
    (tmp_path / "out").mkdir()  # as a checkpoint would
    time.sleep(0.2)
    code, why = lock.check() or (0, "")
    assert code == 75 and f"{out} was removed or moved" in why
    assert not list(out.iterdir())
    lock.release()


def test_a_read_only_disk_does_not_hide_why_a_run_ends(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from prelora_ds.hosts.lock import Lock
lock = Lock(Path({str(tmp_path / NAME)!r})).take()
os.chmod({str(tmp_path)!r}, 0o500)
if os.geteuid() == 0:
    os.seteuid(65534)  # nothing is read-only for root
lock.release()
lock.release()
print("why it ends")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    tmp_path.chmod(0o700)
    assert (done.stdout, done.stderr) == ("why it ends\n", "")
