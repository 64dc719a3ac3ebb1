"""`prelora watch` on runs that were written and not trained."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.histories import write_history

from prelora_ds.core.codec import from_json, to_json
from prelora_ds.core.controller import PhaseController
from prelora_ds.core.schedule import Timeline
from prelora_ds.core.switch_tests.prelora import Observation
from prelora_ds.hosts.lock import Lock
from prelora_ds.reporting.watch import RunWatch
from prelora_ds.reporting.watch_view import compact, duration, line, page, sparkline
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import read_lines

WATCH = [sys.executable, "-m", "prelora_ds.cli", "watch"]
# A phase that ends in the middle of a window, and then one with a test.
LISTED = ("phases=[{name: first, train: [all], until: 7 epochs}, {name: tested, train: [all], "
          "until: {test: prelora, tau: 1, zeta: 5, k: 4, m: 3}}, {name: last, train: [all]}]", "convergence=null")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    write_history(RunFolder(folder), "vit_large_in1k_prelora_exp1")
    return folder


def append(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def began(phase: str, step: int) -> dict[str, Any]:
    return {"event": "plan", "step": step, "phase": phase, "reason": f"{phase} begins", "trainable_parameters": 1}


SLIDING = (LISTED[0].replace("tau: 1,", "tau: 0.3,").replace("m: 3", "m: 3, windows: sliding"), LISTED[1])


@pytest.mark.parametrize("overrides", [(), LISTED, SLIDING], ids=["preset", "list", "sliding"])
def test_the_next_test_is_when_the_controller_makes_it(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """At every observation, compared with the controller itself."""
    folder = RunFolder(tmp_path / "out")
    config, layout = write_history(folder, "vit_large_in1k_prelora_exp1", *overrides, samples=20_000)
    timeline = Timeline(20_000, config.train.global_batch_size, config.train.duration)
    controller = PhaseController(layout=layout, timeline=timeline, phases=config.specs(), seed=config.run.seed)
    observations = [from_json(Observation, row) for row in read_lines(folder.observations)]
    folder.events.write_text("")
    folder.metrics.write_text("")

    state, seen = controller.initial(), RunWatch(folder)
    append(folder.events, began(state.plan.phase, 0))
    expected: list[tuple[int, int | None]] = []  # a step, and what was said after it
    tests: list[int] = []
    switched = None
    for observation in observations:
        before, state = state, controller.next(state, observation)
        if state.tests > before.tests:
            tests.append(observation.step)
        if state.windows[-1:] != before.windows[-1:]:
            append(folder.windows, {"phase": before.plan.phase, **to_json(state.windows[-1]), "tests": state.tests})
        if state.plan.phase != before.plan.phase:
            append(folder.events, began(state.plan.phase, observation.step))
            if before.tests != state.tests:
                switched = observation.step
                break
        append(folder.metrics, {"step": observation.step, "epoch": 1.0, "phase": state.plan.phase})
        status = seen.status()
        assert status.phase == state.plan.phase
        if status.test is not None:
            expected.append((observation.step, status.test.next_step))
    assert switched is not None and len(tests) > 3
    assert len(expected) > 10
    for step, said in expected:
        assert said == min(test for test in tests if test > step)


@pytest.mark.parametrize(("until", "shown"), [
    ("{test: t_test, m: 2}", "test    p 0.3 that the loss did not fall"),
    ("{any: [{test: t_test, m: 2}, {test: fixed, at: 0.5}]}", "test    p 0.3 that the loss did not fall"),
    ("{test: fixed, at: 0.5}", "until   step 46,918, at the observation that follows"),
    ("{test: budget, share: 0.5}", "test    the budget ends this phase"),
])
def test_another_test_is_shown_by_what_it_has_said(tmp_path: Path, until: str, shown: str) -> None:
    folder = RunFolder(tmp_path / "out")
    phases = f"phases=[{{name: full, until: {until}}}, {{name: lora, adapters: {{rank: 4}}}}]"
    write_history(folder, "vit_large_in1k", phases)
    append(folder.events, began("full", 0))
    if "t_test" in until:
        assert any("has not been made yet" in text or "ends this phase" in text
                   for text in page(RunWatch(folder).status()))
        append(folder.windows, {"phase": "full", "index": 0, "last_step": 10, "loss": 2.0, "norms": {"q": {"0": 1.0}},
                                "tests": 1, "verdict": "p 0.3 that the loss did not fall"})
    lines = list(page(RunWatch(folder).status()))
    assert shown in lines
    append(folder.events, began("lora", 20))
    append(folder.metrics, {"step": 30, "phase": "lora", "epoch": 1.0})
    assert not any(text.startswith("test") for text in page(RunWatch(folder).status()))


def test_changes_and_what_holds(out: Path) -> None:
    folder = RunFolder(out)
    append(folder.events, began("full", 0))
    norms = [100.0, 104.0, 104.5, 104.6]
    for i, norm in enumerate(norms):
        append(folder.windows, {"phase": "full", "index": i, "last_step": 10 * (i + 1), "loss": 2.0 + 0.2 * (i == 3),
                                "norms": {"q": {"0": norm}, "k": {"0": 50.0}}})
    test = RunWatch(folder).status().test
    assert test is not None and (test.tau, test.zeta, test.needed) == (1.0, 5.0, 2)
    assert test.changes == {"q": pytest.approx(0.5 / 104 * 100), "k": 0.0} and test.loss_change == pytest.approx(10)
    assert test.held == 0, "the loss moved by more than zeta"
    text = "\n".join(page(RunWatch(folder).status()))
    assert "q 0.48" in text and "loss 10.00*" in text and "0 of 2 comparisons hold" in text


def test_alive_by_the_heartbeat_and_never_by_the_last_row(out: Path) -> None:
    folder, now = RunFolder(out), time.time()
    os.utime(folder.metrics, (now - 7200, now - 7200))
    assert RunWatch(folder).status().state == "stopped"
    lock = Lock(folder.lock).take()
    try:
        status = RunWatch(folder).status()
        assert status.state == "running" and status.heartbeat_s is not None and status.heartbeat_s < 30
        assert "left    " in "\n".join(page(status))
        old = RunWatch(folder)
        os.utime(folder.lock, (now - 100, now - 100))
        assert (old.status(now).state, round(old.status(now).heartbeat_s or 0)) == ("silent", 100)
        content = json.loads(folder.lock.read_text())
        folder.lock.write_text(json.dumps(content | {"renewals": 7}))  # renewed, by a clock that is 100 s behind
        os.utime(folder.lock, (now - 100, now - 100))
        assert (old.status(now).state, old.status(now + 5).heartbeat_s) == ("running", 5)
        folder.lock.write_text(json.dumps(content | {"pid": 2**22 - 1}))
        assert RunWatch(folder).status().state == "stopped", "its process has ended"
        folder.lock.write_text(json.dumps(content))
    finally:
        lock.release()
    append(folder.events, {"event": "end", "step": 9})
    assert RunWatch(folder).status().state == "finished"


def test_a_log_that_was_cut_back_and_damaged_lines(out: Path) -> None:
    folder = RunFolder(out)
    watched = RunWatch(folder)
    rows = folder.metrics.read_text().splitlines(keepends=True)
    assert watched.status().step == json.loads(rows[-1])["step"]
    replacement = out / "new"
    replacement.write_text("".join(rows[:100]) + "damage\n" + '{"step": 1')
    os.replace(replacement, folder.metrics)
    status = watched.status()
    assert status.step == json.loads(rows[99])["step"] and len(status.losses) == 100
    assert status.problems == ["metrics.jsonl: line 101 is not JSON and is left out"]
    folder.config.write_text("model: nonsense\n")
    (problem,) = [text for text in watched.status().problems if "config.yaml" in text]
    assert watched.status().total_steps is None and "is required" in problem


def test_time_left_and_walltime(out: Path) -> None:
    folder = RunFolder(out)
    append(folder.metrics, {"step": 93_000, "epoch": 299.0, "phase": "lora", "img_s": 2000.0, "step_s": 0.5,
                            "data_s": 0.1, "train/loss": 2.5, "val/acc1": 0.7})
    setup = json.loads(folder.setup.read_text())
    folder.setup.write_text(json.dumps(setup | {"ends_at": 1000.0}))
    lock = Lock(folder.lock).take()
    status = RunWatch(folder).status(now=400.0)
    lock.release()
    assert status.total_steps is not None and status.step == 93_000
    assert status.eta_s == pytest.approx((status.total_steps - 93_000) * 0.6)
    assert status.walltime_left_s == 600 and status.data_share == pytest.approx(0.1 / 0.6)
    assert "walltime left 10 min 0 s: enough" in line(status)
    assert "another job will be needed" in line(type(status)(**(status.as_json() | {"test": None, "eta_s": 601.0})))
    assert len(list(compact(status))) == 3


def prelora(*arguments: object, code: int = 0) -> str:
    done = subprocess.run([*WATCH, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stdout


def test_once_and_json(out: Path, tmp_path: Path) -> None:
    assert "step 93,836 of 93,836" in prelora(out, "--once")
    status = json.loads(prelora(out, "--once", "--json"))
    assert status["state"] == "stopped" and status["total_steps"] == status["step"] and len(status["losses"]) <= 128
    assert "no run here yet" in prelora(tmp_path / "nowhere", "--once", code=3)
    two = prelora(out, tmp_path / "nowhere", "--once", "--json", code=3).splitlines()
    assert [json.loads(row)["state"] for row in two] == ["stopped", "missing"]


def test_plain_lines_where_there_is_no_terminal(out: Path) -> None:
    append(RunFolder(out).events, {"event": "end", "step": 9})
    text = prelora(out)
    assert text.count("\n") == 1 and "finished" in text and "\x1b" not in text


class Terminal:
    """A process in a pseudo-terminal."""

    def __init__(self, columns: int, lines: int, *arguments: object) -> None:
        self.fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen([*WATCH, *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs,
                                        env=env | {"TERM": "xterm-256color"}, start_new_session=True)
        os.close(theirs)
        self.text = ""

    def read_for(self, seconds: float) -> str:
        """Return what comes within ``seconds``, or until the process has ended."""
        start, deadline = len(self.text), time.monotonic() + seconds
        os.set_blocking(self.fd, False)
        while time.monotonic() < deadline:
            try:
                self.text += os.read(self.fd, 1 << 16).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        return self.text[start:]

    def read_until(self, text: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < deadline and self.process.poll() is None, self.text[-2000:]
            self.read_for(0.1)


@pytest.fixture
def ended() -> Iterator[list[Terminal]]:
    started: list[Terminal] = []
    yield started
    for terminal in started:
        if terminal.process.poll() is None:
            terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.fd)


def test_a_page_that_is_redrawn_at_most_once_a_second_and_never_cleared(out: Path, ended: list[Terminal]) -> None:
    folder = RunFolder(out)
    lock = Lock(folder.lock).take()
    terminal = Terminal(80, 24, out, "--every", 1)
    ended.append(terminal)
    try:
        terminal.read_until("of 2 comparisons")
        terminal.read_for(1.0)
        rows = read_lines(folder.metrics)
        begun, drawn = time.monotonic(), ""
        for i in range(20):  # much faster than the page
            append(folder.metrics, rows[-1] | {"step": 1000 + i, "train/loss": 3.0 + i})
            drawn += terminal.read_for(0.25)
        seconds = time.monotonic() - begun
        redraws = drawn.count("running (heartbeat")
        assert 3 <= redraws <= seconds + 1
        assert "\x1b[2J" not in drawn and "\x1b[?1049l" not in drawn, "the screen is not cleared"
        lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text) for text in re.split(r"\n|\x1b\[H", drawn)]
        assert max(map(len, (text.strip("\r") for text in lines))) <= 80

        status = Path(f"/proc/{terminal.process.pid}/status").read_text()
        resident = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]
        assert resident < 60, f"{resident:.0f} MiB"
        assert "torch" not in Path(f"/proc/{terminal.process.pid}/maps").read_text()
        os.killpg(terminal.process.pid, signal.SIGINT)
        terminal.read_for(3)
        assert terminal.process.wait(10) == 0 and "Traceback" not in terminal.text
    finally:
        lock.release()


def test_sigterm_gives_the_terminal_back(out: Path, ended: list[Terminal]) -> None:
    terminal = Terminal(80, 24, out)
    ended.append(terminal)
    terminal.read_until("not running")
    terminal.process.terminate()
    terminal.read_for(3)
    assert terminal.process.wait(10) == 128 + signal.SIGTERM
    assert "\x1b[?1049l" in terminal.text and "\x1b[?25h" in terminal.text


def test_six_families_fit_on_80_columns(out: Path) -> None:
    folder = RunFolder(out)
    append(folder.events, began("full", 0))
    for i in range(3):
        norms = {family: {"0": 100.0 + 10 * i} for family in ("q", "k", "v", "o", "fc1", "fc2")}
        append(folder.windows, {"phase": "full", "index": i, "last_step": 10 * (i + 1), "loss": 2.0, "norms": norms})
    states = dict.fromkeys(("weights", "gradients", "masters", "moments"), 2**35)
    append(folder.events, {"event": "bytes", "step": 3, "phase": "full", "predicted": states, "measured": states})
    append(folder.metrics, {"step": 9, "phase": "full", "epoch": 1.0, "train/loss": 2.0, "val/acc1": 0.5})
    append(folder.metrics, {"step": 10, "phase": "full", "epoch": 1.0, "train/loss": 2.0, "val/acc1": 0.0})
    status = RunWatch(folder).status()
    assert status.acc1 == 0.0
    status.reason = "a reason\x1b[2J"
    status.run = "/a/very/long/path" * 9
    lines = list(page(status, width=80))
    assert max(map(len, lines)) <= 80 and not any("\x1b" in text for text in lines)
    text = " ".join(lines)
    assert all(f"{family} 10.00*" in text for family in norms) and "tau 1 %, zeta 5 %" in text
    assert "128.00 GiB of states per rank (predicted 128.00 GiB)" in text


def test_logs_that_cannot_be_read_are_named(out: Path, tmp_path: Path) -> None:
    folder = RunFolder(out)
    folder.windows.unlink(missing_ok=True)
    folder.windows.mkdir()
    assert RunWatch(folder).status().problems == ["windows.jsonl cannot be read (Is a directory)"]
    assert RunWatch(RunFolder(tmp_path / ("x" * 300))).status().state == "missing"


def test_a_path_that_the_locale_cannot_show(out: Path, tmp_path: Path) -> None:
    strange = tmp_path / "tïny [red] x"
    out.rename(strange)
    env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*WATCH, str(strange), "--once"], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0 and r"t\xefny [red] x" in done.stdout


def test_a_small_terminal_gets_three_lines(out: Path, ended: list[Terminal]) -> None:
    terminal = Terminal(60, 8, out)
    ended.append(terminal)
    terminal.read_until("not running")
    assert "comparisons" not in terminal.text + terminal.read_for(1.5)


def test_the_last_state_stays_on_the_terminal(out: Path, ended: list[Terminal]) -> None:
    append(RunFolder(out).events, {"event": "end", "step": 9})
    terminal = Terminal(80, 24, out)
    ended.append(terminal)
    terminal.read_for(20)
    assert terminal.process.wait(10) == 0
    assert "finished" in terminal.text.rpartition("\x1b[?1049l")[2]


def test_curves_and_durations() -> None:
    assert sparkline([3, 2, 1], 10) == "█▅▁" and sparkline([1.0] * 9, 3) == "▁▁▁" and sparkline([], 5) == ""
    assert sparkline([0, 0, 1, 1], 2, unicode=False) == "_#"
    assert [duration(s) for s in (0.4, 59, 61, 3725, 180_000)] == [
        "0 s", "59 s", "1 min 1 s", "1 h 2 min", "2 d 2 h"]
