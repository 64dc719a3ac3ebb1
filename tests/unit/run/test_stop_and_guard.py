"""Requests to stop, and the guard that ends a hung process, with real signals and processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from prelora_ds.run import stop as stop_module
from prelora_ds.run.stop import StopRequest


def unstamped(text: str) -> str:
    """The text of a line without its date and time."""
    date, time_of_day, rest = text.split(" ", 2)
    assert (date.count("-"), time_of_day.count(":")) == (2, 2), text
    return rest


@pytest.fixture
def kept_handlers():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_requests_a_stop_and_does_not_end_the_process(number, kept_handlers) -> None:
    stop = StopRequest().install()
    stop.begin_steps()
    assert not stop.asked()
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # at once: a launcher forwards it twice
    assert stop.asked() and stop.reason == number.name


def test_a_second_sigterm_ends_the_process_at_once_but_a_warning_in_between_does_not() -> None:
    code = ("import os, signal, time\nfrom prelora_ds.run import stop\nstop.DEBOUNCE_S = 0.2\n"
            "s = stop.StopRequest().install()\ns.begin_steps()\nos.kill(os.getpid(), 15)\nassert s.asked()\n"
            "time.sleep(0.3)\nos.kill(os.getpid(), 10)\nprint('alive', flush=True)\n"  # as the supervisor does
            "os.kill(os.getpid(), 15)\ntime.sleep(60)")
    done = subprocess.run([sys.executable, "-c", code], timeout=30, check=False, capture_output=True)
    assert (done.returncode, done.stdout) == (128 + 15, b"alive\n")


def test_before_the_first_step_sigterm_ends_a_rank_and_a_warning_waits() -> None:
    code = ("import os\nfrom prelora_ds.run import stop\ns = stop.StopRequest().install()\n"
            "os.kill(os.getpid(), 10)\nassert s.asked()\nos.kill(os.getpid(), 15)\nos._exit(3)")
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == -15


def test_a_run_stops_in_time_for_a_checkpoint_and_a_step_before_its_walltime(monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(stop_module.time, "monotonic", lambda: now[0])
    stop = StopRequest(100.0)
    for _ in range(7):
        now[0] += 10  # a step
        assert not stop.asked(save_s=1.0), now[0]
    now[0] += 10  # at 80 s: 5 s of margin, 2 x (1 s + 10 s) for a checkpoint and a step
    assert stop.asked(save_s=1.0) and "checkpoint.walltime" in str(stop.reason)


GUARDED = """
import sys, threading, time
from prelora_ds.run.guard import Guard
guard = Guard(0.5, rank=3).start()
{}
"""


def guarded(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", GUARDED.format(body)], timeout=30, capture_output=True, text=True,
                          check=False)


def test_a_process_without_progress_ends_with_85_and_all_stacks() -> None:
    done = guarded("def lost_in_here(): time.sleep(60)\nlost_in_here()")
    assert done.returncode == 85
    assert "error (rank 3): no progress for" in done.stderr and "lost_in_here" in done.stderr
    assert "guard.py" in done.stderr  # the stacks of all threads


def test_a_process_that_makes_progress_is_not_ended() -> None:
    assert guarded("for _ in range(12): time.sleep(0.1); guard.beat()").returncode == 0


def test_a_check_ends_the_process_with_its_own_code() -> None:
    done = guarded("guard.watch(lambda: (88, 'fenced'))\n"
                   "for _ in range(99): time.sleep(0.1); guard.beat()")
    assert (done.returncode, unstamped(done.stderr)) == (88, "error (rank 3): fenced\n")


def test_the_guard_ends_a_process_whose_standard_error_has_no_reader() -> None:
    begun = time.monotonic()
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", GUARDED.format("time.sleep(60)")], stderr=writer)
    os.close(reader)
    os.close(writer)
    assert process.wait(30) == 85 and time.monotonic() - begun < 20


def test_a_check_that_raises_is_reported_once_and_the_guard_continues() -> None:
    done = guarded("def broken(): raise KeyError('pid')\n"
                   "guard.watch(broken, every_s=0.05)\n"
                   "for _ in range(10): time.sleep(0.05); guard.beat()\n"
                   "guard.watch(lambda: (88, 'fenced'), every_s=0.05)\ntime.sleep(60)")
    assert done.returncode == 88 and done.stderr.count("KeyError: 'pid'") == 1 and "Traceback" not in done.stderr


def test_an_error_in_before_exit_does_not_keep_the_process_alive() -> None:
    done = guarded("guard.before_exit = lambda code, why: 1 / 0\nguard.watch(lambda: (88, 'fenced'))\ntime.sleep(60)")
    assert (done.returncode, unstamped(done.stderr)) == (88, "error (rank 3): fenced\n")


ORPHAN = """
import sys, time
from prelora_ds.run import guard as module
from prelora_ds.run.stop import StopRequest
module.ORPHAN_LIMIT_S = 0.5
stop = StopRequest()
guard = module.Guard(60.0, rank=3, stop=stop)
guard.watch(lambda: (87, 'the launcher is gone'), every_s=0.05)
{}
"""


def orphan(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", ORPHAN.format(body)], timeout=30, capture_output=True, text=True,
                          check=False)


def test_an_orphan_that_takes_steps_is_asked_to_stop_and_exits_by_itself() -> None:
    done = orphan("stop.begin_steps(); guard.start()\nwhile not stop.asked(): time.sleep(0.1); guard.beat()\n"
                  "print(stop.reason); guard.stop(); sys.exit(99)")
    assert (done.returncode, done.stdout) == (99, "the launcher is gone\n")


def test_an_orphan_ends_with_87_before_the_first_step_or_without_progress() -> None:
    done = orphan("guard.start(); time.sleep(60)")
    assert (done.returncode, unstamped(done.stderr)) == (87, "error (rank 3): the launcher is gone\n")
    done = orphan("stop.begin_steps(); guard.start()\ndef lost_in_here(): time.sleep(60)\nlost_in_here()")
    assert done.returncode == 87 and "no progress for" in done.stderr and "lost_in_here" in done.stderr


@pytest.mark.parametrize(("before", "ended"), [("", "asked"), ("signal.signal(signal.SIGHUP, signal.SIG_IGN)\n", "")])
def test_a_closed_terminal_requests_a_stop_unless_nohup_ignores_it(before: str, ended: str) -> None:
    code = (f"import os, signal\nfrom prelora_ds.run.stop import StopRequest\n{before}s = StopRequest()\n"
            "s.begin_steps()\nos.kill(os.getpid(), 1)\nprint('asked' if s.asked() else '')")
    done = subprocess.run([sys.executable, "-c", code], timeout=30, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ended
