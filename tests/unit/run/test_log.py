"""The logs of a run: losses are reported once, and what is read is correct or refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.values import NORMS, same

from prelora_ds.core.codec import from_json
from prelora_ds.core.switch_tests.prelora import Observation
from prelora_ds.errors import ConfigError
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import EventKind, RunLog, check_logs, json_text, read_lines, sync_logs, truncate_logs


class Monitor:
    """A replacement for the trackers, which only rank 0 has."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def write_row(self, events: Any) -> None:
        self.events += events

    def close(self) -> None:
        pass


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def log(tmp_path: Path, said: list[str]) -> Iterator[RunLog]:
    log = RunLog(RunFolder(tmp_path), Monitor(), said.append)
    yield log
    log.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"step": number, "epoch": number / 2, "phase": "full", "train/loss": 2.5} | more


def fill(folder: Path) -> Path:
    """Write a file that takes all remaining space."""
    with (
        (folder / "filler").open("wb", buffering=0) as filler,
        pytest.raises(OSError, match="No sp"),
    ):
        while True:
            filler.write(bytes(4096))
    return folder / "filler"


def test_rows_are_in_the_file_when_they_are_written(log: RunLog, tmp_path: Path) -> None:
    log.metrics(step(1), samples=64)
    assert read_lines(tmp_path / "metrics.jsonl") == [step(1)]


def test_a_full_disk_loses_whole_rows_with_one_warning_and_later_rows_are_kept(
    small_disk: Path, said: list[str]
) -> None:
    log = RunLog(RunFolder(small_disk), Monitor(), said.append)
    log.metrics(step(1), samples=64)
    filler = fill(small_disk)
    for number in range(2, 200):  # more than fits into the file's last page
        log.metrics(step(number), samples=64 * number)
    filler.unlink()
    log.metrics(step(200), samples=64 * 200)
    log.close()
    steps = [row["step"] for row in read_lines(small_disk / "metrics.jsonl")]
    assert steps == [*range(1, len(steps)), 200] and len(steps) < 150
    assert said == [
        f"warning: {small_disk / 'metrics.jsonl'} cannot be written (No space left on device); "
        "training continues"
    ]


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_log_that_is_removed_is_started_again_with_one_warning(
    how: str, log: RunLog, said: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    for number in range(1, 5):
        if number in (2, 4):
            path.unlink()
            if how == "replaced":
                path.write_text("")
        log.metrics(step(number), samples=number)
    assert [row["step"] for row in read_lines(path)] == [4]
    assert said == [
        f"warning: {path} was removed or replaced; its earlier rows are lost; training continues"
    ]


def test_a_missing_folder_causes_one_warning_per_log(
    said: list[str], tmp_path: Path
) -> None:
    log = RunLog(RunFolder(tmp_path / "none"), Monitor(), said.append)
    for number in range(3):
        log.metrics(step(number + 1), samples=1)
        log.event(EventKind.PLAN, 0)
    assert len(said) == 2 and all("No such file or directory" in text for text in said)


@pytest.mark.parametrize("kind", ["folder", "pipe", "full"])
def test_a_log_that_is_not_a_file_causes_one_warning_and_does_not_block(
    kind: str, said: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "full": lambda: path.symlink_to("/dev/full"),
    }[kind]()
    log = RunLog(RunFolder(tmp_path), Monitor(), said.append)
    log.metrics(step(1), samples=1)
    log.metrics(step(2), samples=2)
    log.close()
    assert len(said) == 1 and "metrics.jsonl cannot be written" in said[0]


def test_other_ranks_write_nothing(tmp_path: Path, said: list[str]) -> None:
    log = RunLog(RunFolder(tmp_path), None, said.append)
    log.metrics(step(1), samples=1)
    log.close()
    assert list(tmp_path.iterdir()) == [] and said == []


def test_numbers_that_json_lacks_become_null(log: RunLog, tmp_path: Path) -> None:
    log.metrics(step(1, **{"train/loss": math.nan, "grad_norm": math.inf}), samples=1)
    log.event(EventKind.BYTES, 3, measured={"weights": -math.inf, "ranks": (1.5, math.nan)})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == step(
        1, **{"train/loss": None, "grad_norm": None}
    )
    assert json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=refuse)[
        "measured"
    ] == {"weights": None, "ranks": [1.5, None]}


@given(loss=st.floats(), norms=NORMS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_observation_is_read_back_bitwise_also_after_a_truncation(
    loss: float, norms: dict[str, dict[int, float]], tmp_path: Path
) -> None:
    folder, seen = RunFolder(tmp_path), [Observation(step, 64, loss, norms) for step in (2, 4, 6)]
    log = RunLog(folder, Monitor())
    for observation in seen:
        log.observation(observation)
    log.close()
    truncate_logs(folder, 4)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in folder.observations.read_text().splitlines()]
    folder.observations.unlink()
    assert same([from_json(Observation, row) for row in rows], seen[:2])


def test_rows_of_earlier_versions_with_nan_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": NaN}\n{"step": 2, "train/loss": -Infinity}\n')
    first, second = read_lines(path)
    assert math.isnan(first["train/loss"]) and second["train/loss"] == -math.inf


@pytest.mark.parametrize(
    "tail", [b"", b'{"step": 3, "epo', b'{"step": 3, "ep\0\0\0\0', b"\0" * 4096]
)
def test_an_unfinished_last_line_is_skipped(tail: bytes, tmp_path: Path) -> None:
    """A kill leaves it, or a power cut, after which unwritten blocks are zeros."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((json_text(step(1)) + "\n" + json_text(step(2)) + "\n").encode() + tail)
    assert read_lines(path) == [step(1), step(2)]
    truncate_logs(RunFolder(tmp_path), 2)
    assert path.read_text() == json_text(step(1)) + "\n" + json_text(step(2)) + "\n"


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "null",
        "1",
        "\x00x",
        "{'step': 1}",
        "[" * 5000,
        '{"step": 1} {}',
        '{"step": "1"}',
        '{"step": true}',
        '{"step": 1.5}',
        "{}",
    ],
)
def test_a_damaged_line_is_reported_before_a_run_resumes(line: str, tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_text(f'{{"last_step": 1}}\n{line}\n{{"last_step": 3}}\n')
    with pytest.raises(ConfigError, match="line 2 ") as caught:
        check_logs(RunFolder(tmp_path))
    assert (caught.value.key, caught.value.value) == ("log", str(path))


def test_a_truncated_log_keeps_the_rows_up_to_the_step(tmp_path: Path) -> None:
    rows = {
        "metrics": [step(n) for n in range(1, 9)],
        "events": [
            {"event": "plan", "step": 0},
            {"event": "bytes", "step": 3},
            {"event": "plan", "step": 6},
        ],
        "windows": [{"last_step": 4, "loss": 1.0}, {"last_step": 8, "loss": 0.5}],
        "observations": [{"step": n, "loss": 1 / n} for n in (2, 4, 6, 8)],
    }
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json_text(row) + "\n" for row in content))
    truncate_logs(RunFolder(tmp_path), 5)
    assert read_lines(tmp_path / "metrics.jsonl") == rows["metrics"][:5]
    assert read_lines(tmp_path / "events.jsonl") == rows["events"][:2]
    assert read_lines(tmp_path / "windows.jsonl") == rows["windows"][:1]
    assert read_lines(tmp_path / "observations.jsonl") == rows["observations"][:2]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl"] * 4


def test_the_events_of_version_0_1_0_are_read_and_renamed_when_a_run_resumes(
    tmp_path: Path,
) -> None:
    folder, rows = RunFolder(tmp_path), LOGS_OF_5_STEPS["events"]
    assert folder.events_to_read == folder.events
    folder.former_events.write_text("".join(json_text(row) + "\n" for row in rows) + '{"event"')
    assert folder.events_to_read == folder.former_events
    check_logs(folder)
    assert folder.former_events.is_file()  # until the run resumes
    truncate_logs(folder, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]
    assert read_lines(folder.events_to_read) == rows[:3]
    folder.former_events.write_text("left by version 0.1.0, which was started once more\n")
    check_logs(folder)
    truncate_logs(folder, 1)
    assert read_lines(folder.events_to_read) == rows[:2] and folder.former_events.is_file()


def test_a_damaged_log_of_version_0_1_0_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.former_events.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"plans\.jsonl': line 1 has no step"):
        check_logs(folder)


def test_a_log_that_stays_complete_needs_no_space_on_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "metrics.jsonl"
    path.write_text("".join(json_text(step(n)) + "\n" for n in range(1, 9)))
    fill(small_disk)
    truncate_logs(RunFolder(small_disk), 8)
    with pytest.raises(OSError, match="No space left"):
        truncate_logs(RunFolder(small_disk), 7)
    assert len(read_lines(path)) == 8


def test_missing_logs_need_no_sync(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    (tmp_path / "windows.jsonl").write_text("")
    sync_logs(RunFolder(tmp_path))
    assert (tmp_path / "windows.jsonl").read_text() == ""


LOGS_OF_5_STEPS = {
    "metrics": [step(n) for n in range(1, 6)],
    "events": [{"event": "plan", "step": n, "phase": "full", "switch": None} for n in range(5)],
    "windows": [{"index": n, "last_step": n, "loss": 1.5, "norms": {"q": {"0": 2.5}}} for n in range(5)],
    "observations": [{"step": n, "samples": 64, "loss": None, "norms": {"q": {"0": 2.5}}} for n in range(5)],
}
WORDS = [b"null", b"NaN", b"1e999", b"-1", b'"', b"{}", b"[]", b"\n", b"\0", b"9" * 30, b"true"]


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw the name of a log, and its content with a few bytes replaced, removed or inserted."""
    name = draw(st.sampled_from(sorted(LOGS_OF_5_STEPS)))
    data = bytearray("".join(json_text(row) + "\n" for row in LOGS_OF_5_STEPS[name]).encode())
    for _ in range(draw(st.integers(1, 3))):
        at, cut = draw(st.integers(0, len(data))), draw(st.integers(0, 12))
        data[at : at + cut] = draw(st.binary(max_size=4) | st.sampled_from(WORDS))
    return name, bytes(data)


@settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(log=mutations(), until=st.integers(-1, 6))
def test_a_damaged_log_is_truncated_correctly_or_refused(
    log: tuple[str, bytes], until: int, tmp_path: Path
) -> None:
    for other in tmp_path.iterdir():
        other.unlink()
    name, data = log
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(data)
    try:
        rows = read_lines(path)
        check_logs(RunFolder(tmp_path))
    except ConfigError as error:
        assert error.key == "log"
        with pytest.raises(ConfigError):
            truncate_logs(RunFolder(tmp_path), until)
        assert path.read_bytes() == data
        return
    truncate_logs(RunFolder(tmp_path), until)
    wanted = [row for row in rows if row.get("step", row.get("last_step")) <= until]
    assert json_text(read_lines(path)) == json_text(wanted)


def test_rows_reach_the_operating_system_one_by_one_and_the_disk_when_a_job_ends(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def counting(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counting)
    folder = RunFolder(tmp_path)
    log = RunLog(folder, Monitor())
    for step in range(1, 101):
        log.metrics({"step": step}, samples=step)
        log.event(EventKind.WAIT, step)
        assert len(read_lines(folder.metrics)) == len(read_lines(folder.events)) == step
    assert synced == []
    log.close()
    assert sorted(synced) == sorted(path.name for path in folder.logs)
