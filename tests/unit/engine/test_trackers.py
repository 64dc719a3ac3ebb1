"""The parts of trackers that need no run."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from prelora_ds.config.load import load_config
from prelora_ds.engine.monitor import EnduringMonitor
from prelora_ds.engine.trackers import Event, Tracker
from prelora_ds.engine.trackers.comet import Comet
from prelora_ds.engine.trackers.files import cut_csv
from prelora_ds.engine.trackers.service import HandedOver, Service, environment, reachable, run_id, within
from prelora_ds.engine.trackers.wandb import Wandb
from prelora_ds.errors import ConfigError
from prelora_ds.start import check_trackers

DEBUG = "launch/recipes/vit_tiny_debug.yaml"


class Recorded(Service):
    """A service that is a list, always offline."""

    key = "recorded"
    title = "Recorded"

    def __init__(self, folder: Path, taken: list[Event], said: list[str]) -> None:
        super().__init__(folder, "name", "project", said.append)
        self.taken = taken

    def _users_choice(self) -> tuple[bool, str]:
        return False, "of the test"

    def _has_key(self) -> bool:
        return False

    def _address(self) -> str:
        return ""

    def _unsent(self) -> bool:
        return False

    def _start(self, run: str) -> None:
        self.run = run

    def _hand_over(self, events: Sequence[Event]) -> None:
        self.taken += events

    def _finish(self) -> None: ...

    def _sync_command(self) -> str:
        return "send"


class Failing(Tracker):
    """A tracker that fails at ``fault`` for the first time."""

    def __init__(self, what: str, fault: str) -> None:
        self.what = what
        self.fault = fault
        self.calls: list[str] = []

    def _act(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fault:
            raise OSError("no space")

    def open(self, after_samples: int) -> None:
        self._act("open")

    def write(self, events: Sequence[Event]) -> None:
        self._act("write")

    def rewind(self, after_samples: int) -> None:
        self._act("rewind")

    def close(self) -> None:
        self._act("close")


def recording(folder: Path) -> tuple[EnduringMonitor, list[Event], list[str]]:
    taken: list[Event] = []
    said: list[str] = []
    return EnduringMonitor([Recorded(folder, taken, said)], 0, said.append), taken, said


# ---- one for all

@pytest.mark.parametrize("fault", ["open", "write", "rewind", "close"])
def test_a_tracker_that_fails_costs_one_warning_and_stops_no_other(fault: str) -> None:
    said: list[str] = []
    bad, good = Failing("bad events", fault), Failing("good events", "")
    monitor = EnduringMonitor([bad, good], 0, said.append)
    for step in range(2):
        monitor.write_row([("loss", 1.0, step)])
    monitor.rewind(0)
    monitor.close()
    assert said == ["warning: bad events cannot be written (no space); training continues"]
    assert good.calls == ["open", "write", "write", "rewind", "close"]
    assert bad.calls == good.calls[: good.calls.index(fault) + 1]


def test_a_run_may_have_no_trackers() -> None:
    monitor = EnduringMonitor([], 0, pytest.fail)
    assert not monitor.enabled
    monitor.write_row([("loss", 1.0, 1)])
    monitor.close()


# ---- services

def test_a_service_gets_each_step_once_and_whole(tmp_path: Path) -> None:
    monitor, taken, said = recording(tmp_path)
    monitor.write_events([("lr", 0.1, 64)])
    monitor.write_row([("loss", 1.0, 64)])
    monitor.write_events([("lr", 0.2, 128)])  # a step without a row
    monitor.write_events([("lr", 0.3, 192)])  # the job is killed before its row
    assert taken == [("lr", 0.1, 64), ("loss", 1.0, 64), ("lr", 0.2, 128)]

    monitor, again, said = recording(tmp_path)
    for step in (1, 2, 3):
        monitor.write_events([("lr", step / 10, 64 * step)])
        monitor.write_row([("loss", 1.0, 64 * step)])
    assert again == [("lr", 0.3, 192), ("loss", 1.0, 192)]

    monitor.write_events([("lr", 0.4, 256)])  # it diverges
    monitor.rewind(64)
    for step in (2, 3, 4):
        monitor.write_row([("loss", 1.0, 64 * step)])
    assert again[2:] == [("loss", 1.0, 256)]
    monitor.close()
    assert said == ["Recorded: offline, because of the test",
                    "Recorded: to send what was recorded offline, run: send"]


def test_what_was_handed_over_survives_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "wandb.samples"
    first = HandedOver(path)
    assert [first.advance(samples) for samples in (64, 64, 32, 128)] == [True, False, False, True]
    assert HandedOver(path).samples == 128
    path.write_bytes(b"\0" * 21)
    assert HandedOver(path).samples == -1


def test_a_run_has_one_identifier(tmp_path: Path) -> None:
    first = run_id(tmp_path / "id")
    assert len(first) == 32 and int(first, 16) >= 0
    assert run_id(tmp_path / "id") == first
    other = tmp_path / "other"
    other.mkdir()
    assert run_id(other / "id") != first


# ---- online or offline

@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server that knows nothing, and does not answer GET."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:
            if self.path == "/slow":
                time.sleep(2)
            self.send_error(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_service_is_reachable_if_anything_answers_in_time(server: str) -> None:
    assert reachable(server)
    begun = time.monotonic()
    assert not reachable(f"{server}/slow", timeout_s=0.2)
    assert not reachable("http://127.0.0.1:9")  # nothing listens there
    assert not reachable("not an address")
    assert not reachable("http://name.invalid")
    assert time.monotonic() - begun < 8  # looking up a name may take up to 3 s


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment that says nothing about any service."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "COMET_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_w_and_b_is_online_only_with_a_key_and_a_route(bare: pytest.MonkeyPatch, server: str, tmp_path: Path) -> None:
    wandb = Wandb(tmp_path, "name", "project", print)
    bare.setenv("WANDB_BASE_URL", server)
    assert wandb._choose_mode() == (False, "no API key is known on this host")
    (tmp_path / "netrc").write_text(f"machine {server.removeprefix('http://')} login user password secret\n")
    assert wandb._choose_mode() == (True, f"{server} answers")
    (tmp_path / "netrc").unlink()
    bare.setenv("WANDB_API_KEY", "secret")
    assert wandb._choose_mode() == (True, f"{server} answers")
    bare.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert wandb._choose_mode() == (False, "http://127.0.0.1:9 does not answer from this host")
    bare.setenv("WANDB_BASE_URL", server)
    recorded = tmp_path / "wandb/offline-run-1-abc/run-abc.wandb"
    recorded.parent.mkdir(parents=True)
    recorded.write_bytes(bytes(100))
    assert wandb._choose_mode() == (
        False, "figures of an earlier job were not sent yet, and steps have to arrive in order")
    recorded.with_name("run-abc.wandb.synced").touch()
    assert wandb._choose_mode() == (True, f"{server} answers")
    bare.setenv("WANDB_MODE", "offline")
    assert wandb._choose_mode() == (False, "WANDB_MODE is offline")


def test_comet_is_online_only_with_a_key_and_a_route(bare: pytest.MonkeyPatch, server: str, tmp_path: Path) -> None:
    comet = Comet(tmp_path, "name", "project", print)
    bare.setenv("COMET_URL_OVERRIDE", server)
    assert comet._choose_mode() == (False, "no API key is known on this host")
    bare.setenv("COMET_API_KEY", "secret")
    assert comet._choose_mode() == (True, f"{server} answers")
    bare.setenv("COMET_URL_OVERRIDE", "http://127.0.0.1:9")
    assert comet._choose_mode() == (False, "http://127.0.0.1:9 does not answer from this host")
    bare.setenv("COMET_START_ONLINE", "false")
    assert comet._choose_mode() == (False, "COMET_START_ONLINE is False")
    bare.setenv("COMET_START_ONLINE", "true")
    assert comet._choose_mode() == (True, "COMET_START_ONLINE is True")


def test_the_environment_is_restored(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("WANDB_DIR", "mine")
    bare.setenv("WANDB_CONSOLE", "wrap")
    before = dict(os.environ)
    with environment({"WANDB_DIR": "the run's"}, {"WANDB_CONSOLE": "off", "WANDB_SILENT": "true"}):
        assert os.environ["WANDB_DIR"] == "the run's"
        assert (os.environ["WANDB_CONSOLE"], os.environ["WANDB_SILENT"]) == ("wrap", "true")
    assert dict(os.environ) == before


def test_what_does_not_end_is_left_behind() -> None:
    with pytest.raises(TimeoutError, match="not finished after 0 s"):
        within(0.1, lambda: time.sleep(2))
    with pytest.raises(OSError, match="lost"):
        within(5, lambda: (_ for _ in ()).throw(OSError("lost")))
    within(5, lambda: None)


# ---- CSV

@pytest.mark.parametrize(("text", "left"), [
    (b"step,loss\n64,1.0\n128,2.0\n192,3.0\n", b"step,loss\n64,1.0\n128,2.0\n"),
    (b"step,loss\r\n64,1.0\r\n128,2.", b"step,loss\r\n64,1.0\r\n"),
    (b"step,loss\n64,1.0\n128,2.0\n", b"step,loss\n64,1.0\n128,2.0\n"),
    (b"step,loss\n192,1.0\n", b"step,loss\n"),
    (b"step,lo", None),
    (b"", None),
])
def test_a_csv_file_is_cut_back_to_a_checkpoint(text: bytes, left: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "train_loss.csv"
    path.write_bytes(text)
    assert cut_csv(path, 128) == (left is not None)
    assert (path.read_bytes() if path.exists() else None) == left


# ---- settings

def test_a_tracker_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(["tensorboard", "csv", "wandb", "comet"])
    monkeypatch.setattr(sys, "path", [])
    check_trackers(["tensorboard", "csv"])
    for tracker, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        with pytest.raises(ConfigError, match=f"needs the package {package}, which is not installed") as error:
            check_trackers(["csv", tracker])
        assert error.value.key == "run.trackers"


def test_trackers_are_chosen_by_an_override() -> None:
    assert load_config(DEBUG).run.trackers == ("tensorboard",)
    assert load_config(DEBUG, ["run.trackers=[]"]).run.trackers == ()
    assert load_config(DEBUG, ["run.trackers=[csv,wandb]"]).run.trackers == ("csv", "wandb")
    for wrong in ("[csv,csv]", "[mlflow]"):
        with pytest.raises(ConfigError, match=r"run\.trackers"):
            load_config(DEBUG, [f"run.trackers={wrong}"])
