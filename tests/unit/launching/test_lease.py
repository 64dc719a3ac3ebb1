"""One job in a folder: who holds it, who is dead, who takes over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prelora_ds.core.errors import LaunchError
from prelora_ds.launching import lease as lease_module
from prelora_ds.launching.lease import NAME, Lease


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEWED_EVERY_S", 0.05)
    monkeypatch.setattr(lease_module, "DEAD_AFTER_S", 0.6)


def left_behind(folder: Path, **changes: object) -> None:
    """A lease as another process would have left it."""
    lease = Lease(folder)
    (folder / NAME).write_text(json.dumps(json.loads(lease._text(0)) | changes))


def test_a_living_job_holds_its_folder_and_the_message_names_it(tmp_path: Path) -> None:
    first = Lease(tmp_path).take()
    with pytest.raises(LaunchError, match=f"is in use by process {os.getpid()} on .*\n  remedy: end that job"):
        Lease(tmp_path).take()
    first.release()
    assert not (tmp_path / NAME).exists()
    Lease(tmp_path).take().release()


def test_a_killed_process_of_this_machine_holds_nothing_and_nobody_waits(tmp_path: Path) -> None:
    code = (f"from pathlib import Path; import os; from prelora_ds.launching.lease import Lease; "
            f"Lease(Path({str(tmp_path)!r})).take(); os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert (tmp_path / NAME).exists()
    begun = time.monotonic()
    Lease(tmp_path).take().release()
    assert time.monotonic() - begun < 0.5


def test_another_host_s_lease_counts_while_it_changes_and_not_after(tmp_path: Path) -> None:
    left_behind(tmp_path, host="elsewhere", boot="other")
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.1):
            left_behind(tmp_path, host="elsewhere", boot="other", renewals=time.monotonic())

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(LaunchError, match=r"is in use by process .* on elsewhere"):
            Lease(tmp_path).take()
    finally:
        ended.set()
        thread.join()
    begun = time.monotonic()
    Lease(tmp_path).take().release()
    assert time.monotonic() - begun >= 0.6


def test_a_number_given_to_another_process_is_no_holder(tmp_path: Path) -> None:
    left_behind(tmp_path, born="1")
    lease = Lease(tmp_path).take()
    assert json.loads((tmp_path / NAME).read_text())["born"] not in (None, "1") and lease.check() is None
    lease.release()


def test_a_job_that_was_given_up_for_dead_learns_of_it_and_leaves_the_new_lease_alone(tmp_path: Path) -> None:
    frozen = Lease(tmp_path).take()
    assert frozen.check() is None
    left_behind(tmp_path, token="new", host="elsewhere")
    time.sleep(0.2)
    code, why = frozen.check() or (0, "")
    assert code == 88 and "taken over by process" in why and "elsewhere" in why
    frozen.release()
    assert json.loads((tmp_path / NAME).read_text())["token"] == "new"


def test_a_lease_that_is_no_json_is_nobody_s(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("")
    lease = Lease(tmp_path).take()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid() and lease.check() is None
    lease.release()
