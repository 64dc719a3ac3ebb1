from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from prelora_ds.data.store import CorruptSampleError
from prelora_ds.data.workers import WorkerLostError
from prelora_ds.errors import ConfigError, DiskError, RefusedError, TrainingDivergedError
from prelora_ds.hosts import exits
from prelora_ds.hosts.discovery import Ranks

CONFIG_ERROR = ConfigError("train.log_every", -1, "is negative", "choose 1 or more")
DIVERGED = TrainingDivergedError("step 7, phase lora: the loss is nan")


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the seconds of each sleep without sleeping."""
    naps: list[float] = []
    monkeypatch.setattr(exits.time, "sleep", naps.append)
    return naps


@pytest.mark.parametrize(("error", "code"), [(CONFIG_ERROR, 2), (DIVERGED, 1)])
def test_rank_0_prints_the_error_once_and_at_once(
    error, code: int, capsys: pytest.CaptureFixture[str], naps: list[float]
) -> None:
    with pytest.raises(SystemExit) as ended:
        exits.fail(error, Ranks(0, 0, 8))
    out, err = capsys.readouterr()
    assert ended.value.code == code
    assert err == f"error: {error}\n"
    assert out == ""
    assert naps == []


@pytest.mark.parametrize(("error", "code"), [(CONFIG_ERROR, 2), (DIVERGED, 1)])
def test_the_first_rank_of_another_host_prints_with_its_rank_after_the_grace_period(
    error, code: int, capsys: pytest.CaptureFixture[str], naps: list[float]
) -> None:
    with pytest.raises(SystemExit) as ended:
        exits.fail(error, Ranks(4, 0, 8))
    assert naps == [exits.GRACE_S]
    assert ended.value.code == code
    assert capsys.readouterr().err == f"error (rank 4 on {exits.socket.gethostname()}): {error}\n"


def test_the_other_ranks_of_a_host_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        exits.fail(CONFIG_ERROR, Ranks(5, 1, 8))
    assert ended.value.code == 2
    assert capsys.readouterr().err == ""


def test_of_ranks_refused_by_another_only_rank_0_prints_and_the_others_let_it_exit_first(
    capsys: pytest.CaptureFixture[str], naps: list[float]
) -> None:
    said = {}
    for rank in (0, 1, 4):
        with pytest.raises(SystemExit) as ended:
            exits.fail(RefusedError(2, "b", 2, "no data"), Ranks(rank, rank % 4, 8))
        assert ended.value.code == 2
        said[rank] = capsys.readouterr().err
    assert said == {0: "error: rank 2 on host b could not start: no data\n", 1: "", 4: ""}
    assert naps == [exits.ECHO_GRACE_S] * 2


@pytest.mark.parametrize("error", [CorruptSampleError("sample 3 of shard-000001.tar", "look"),
                                   WorkerLostError("it is gone")])
def test_an_error_of_a_single_rank_is_printed_at_once(
    error, capsys: pytest.CaptureFixture[str], naps: list[float]
) -> None:
    with pytest.raises(SystemExit) as ended:
        exits.fail(error, Ranks(5, 1, 8))
    assert (ended.value.code, naps) == (1, [])
    assert capsys.readouterr().err == f"error (rank 5 on {socket.gethostname()}): {error}\n"


def test_an_error_that_other_ranks_may_meet_is_first_left_to_rank_0(capsys: pytest.CaptureFixture[str],
                                                                naps: list[float]) -> None:
    error = DiskError("data", "index.npy", "was cut", "look")
    with pytest.raises(SystemExit) as ended:
        exits.fail(error, Ranks(5, 1, 8))
    assert (ended.value.code, naps) == (75, [exits.ECHO_GRACE_S])
    assert capsys.readouterr().err == f"error (rank 5 on {socket.gethostname()}): {error}\n"


def test_a_rank_that_the_launcher_ends_within_the_grace_period_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended_by_the_launcher(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exits.time, "sleep", ended_by_the_launcher)
    with pytest.raises(KeyboardInterrupt):
        exits.fail(CONFIG_ERROR, Ranks(1, 1, 8))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("error", "said", "slept"), [
    (RuntimeError("[pair.cc:561] Connection closed by peer [10.0.0.1]:43174. This is typically ...\nGLHF!"),
     "lost the connection to another rank ([pair.cc:561] Connection closed by peer [10.0.0.1]:43174.",
     [exits.ECHO_GRACE_S]),
    (BrokenPipeError(32, "Broken pipe"), "failed\nBrokenPipeError: [Errno 32] Broken pipe\n", []),
    (ValueError("no such thing"), "failed\nValueError: no such thing\n", []),
])
def test_a_crashed_rank_prints_at_once_and_one_that_lost_its_peer_waits_for_the_launcher(
    error: Exception, said: str, slept: list[float], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], naps: list[float]
) -> None:
    def ends(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(exits.os, "_exit", ends)
    with pytest.raises(SystemExit) as ended:
        exits.crash(Ranks(1, 0, 2), error)
    assert (ended.value.code, naps) == (1, slept)
    told = capsys.readouterr().err
    with pytest.raises(SystemExit):  # the launcher has already sent its signal
        exits.crash(Ranks(1, 0, 2), error, ending=True)
    assert naps == slept and bool(capsys.readouterr().err) == (not slept)
    assert told.startswith(f"error: rank 1 on {socket.gethostname()} {said}") and "GLHF" not in told


def test_the_message_of_a_config_error_names_key_value_problem_and_remedy() -> None:
    assert str(CONFIG_ERROR) == "train.log_every = -1: is negative\n  remedy: choose 1 or more"


@pytest.mark.parametrize(("rank", "said"), [(0, "interrupted\n"), (1, "")])
def test_after_ctrl_c_only_rank_0_prints_and_every_rank_exits_with_130(
    rank: int, said: str, capsys: pytest.CaptureFixture[str], naps: list[float]
) -> None:
    with pytest.raises(SystemExit) as ended:
        exits.interrupted(Ranks(rank, rank, 2))
    assert ended.value.code == 130
    assert capsys.readouterr().err == said
    assert naps == []


# ---- standard streams

PRINTS = """
import os, sys
from prelora_ds.hosts.exits import ignore_output_errors
ignore_output_errors()
file = os.open({path!r}, os.O_CREAT | os.O_WRONLY)
for number in range(3):
    print("out", number, flush=True)
    print("err", number, file=sys.stderr, flush=True)
    os.write(1, b"C out\\n") if {c} else None
print("unflushed", "x" * 100_000)
os.write(file, b"content")
sys.exit(7)
"""


def prints(
    tmp_path: Path, redirections: str, *, c: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a process that prints to both streams and writes a file; it exits with 7 if all went well."""
    script = tmp_path / "prints.py"
    script.write_text(PRINTS.format(path=str(tmp_path / "file"), c=c))
    return subprocess.run(
        f"{sys.executable} {script} {redirections}",
        shell=True,
        text=True,
        timeout=60,
        capture_output=True,
        check=False,
    )


FULL = "cannot be written (No space left on device); its text is lost"


@pytest.mark.parametrize(
    ("redirections", "out", "err"),
    [
        (">/dev/full", "", f"err 0\nerr 1\nerr 2\nwarning: standard output {FULL}\n"),
        ("2>/dev/full", f"out 0\nwarning: standard error {FULL}\nout 1\nout 2\nunflushed", ""),
        (">/dev/full 2>&1", "", ""),
        (">&-", "", "err 0\nerr 1\nerr 2\n"),
        ("2>&-", "out 0\nout 1\nout 2\nunflushed", ""),
        (">&- 2>&-", "", ""),
        ("<&- >&- 2>&-", "", ""),
    ],
)
def test_a_full_or_closed_stream_does_not_end_the_process_and_is_reported_on_the_other(
    redirections: str, out: str, err: str, tmp_path: Path
) -> None:
    ended = prints(tmp_path, redirections)
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout.split(" x")[0] == out
    assert sorted(ended.stderr.splitlines()) == sorted(err.splitlines())
    assert (tmp_path / "file").read_text() == "content"


def test_text_for_a_closed_stream_does_not_reach_a_file(tmp_path: Path) -> None:
    ended = prints(tmp_path, ">&-", c=True)
    assert ended.returncode == 7 and (tmp_path / "file").read_text() == "content"


def test_a_terminal_without_utf_8_does_not_end_the_process(tmp_path: Path) -> None:
    script = ("from prelora_ds.hosts.exits import ignore_output_errors\nignore_output_errors()\n"
              "print('caf\\u00e9', '\\ud800')")
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, b"caf\\xe9 \\ud800\n")


def test_a_disk_fault_is_one_message_with_exit_code_75_and_a_bug_is_1() -> None:
    script = ("import errno, sys\nfrom prelora_ds.hosts.exits import crash\n"
              "from prelora_ds.hosts.discovery import Ranks\n"
              "crash(Ranks(1, 1, 2), OSError(getattr(errno, sys.argv[1]), 'it failed', 'file'))")
    codes = {}
    for name in ("ENOSPC", "EIO", "EPERM"):
        ended = subprocess.run(
            [sys.executable, "-c", script, name], text=True, capture_output=True, check=False
        )
        codes[name] = ended.returncode
        assert ("failed\n" in ended.stderr) == (name == "EPERM"), ended.stderr
    assert codes == {"ENOSPC": 75, "EIO": 75, "EPERM": 1}
