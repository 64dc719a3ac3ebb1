"""`prelora` as a user meets it: one message for a mistake, and exit code 2."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from prelora_ds import cli
from prelora_ds.commands.output import refuse_empty
from prelora_ds.data.shards.writer import write_digits
from prelora_ds.errors import ConfigError
from prelora_ds.run.checkpoints.checkpoint_folder import CheckpointManifest, FileRecord, commit, step_folder


def prelora(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of the entry point."""
    monkeypatch.setattr(sys, "argv", ["prelora", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return 0 if ended.value.code is None else int(ended.value.code)


def test_a_config_error_is_one_message_on_stderr_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert prelora(monkeypatch, "report", tmp_path) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (f"error: OUTPUT = {str(tmp_path)!r}: holds no run\n"
                   "  remedy: name the run.output_dir of a run\n")


def test_a_data_folder_that_is_missing_is_told_by_its_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert prelora(monkeypatch, "evaluate", tmp_path, "--data", tmp_path / "none") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --data = {str(tmp_path / 'none')!r}: no such folder\n  remedy: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["no-such-command"], ["report"], ["report", "a", "b"], ["shards", "imagenet"],
                                       ["shards", "digits", "x", "--samples-per-shard", "0"]])
def test_a_command_line_that_is_wrong_ends_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert prelora(monkeypatch, *arguments) == 2
    assert "Error" in capsys.readouterr().err


def test_help_lists_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert prelora(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("shards", "plan", "evaluate", "report"))


def test_a_report_ends_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({
        "step": 1, "epoch": 0.5, "phase": "full", "train/loss": 2.5, "step_s": 0.25, "data_s": 0.0}) + "\n")
    (tmp_path / "events.jsonl").write_text(json.dumps({
        "event": "plan", "step": 0, "phase": "full", "reason": "training begins", "trainable_parameters": 4321,
        "switch": None}) + "\n")
    assert prelora(monkeypatch, "report", tmp_path) == 0
    out = capsys.readouterr().out
    assert "4,321" in out
    assert "2.5000" in out
    assert "full from step 1: training begins" in out


RUN = {"metrics.jsonl": {"step": 1, "epoch": 0.5, "train/loss": 2.5, "step_s": 0.25, "data_s": 0.0},
       "events.jsonl": {"event": "plan", "step": 0, "phase": "full", "reason": "training begins",
                       "trainable_parameters": 4321, "switch": None}}


def test_an_output_that_cannot_be_written_is_one_message_and_75(tmp_path: Path) -> None:
    for name, row in RUN.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "prelora_ds.cli", "report", tmp_path],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 75
    assert ended.stderr.startswith("error: [Errno 28] No space left on device\n  remedy: ")
    assert len(ended.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    "content", [b"", b"garbage\n", b"\xff\xfe\n", b"{}\n", b"[1]\n", b"\0" * 99]
)
def test_a_report_on_logs_that_are_empty_or_garbage_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: bytes,
) -> None:
    for damaged in RUN:
        for name, row in RUN.items():
            (tmp_path / name).write_text(json.dumps(row) + "\n")
        (tmp_path / damaged).write_bytes(content)
        assert prelora(monkeypatch, "report", tmp_path) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("error: "), err.count("remedy: ")) == (
            "",
            1,
            1,
        ) and "Traceback" not in err


def test_checkpoints_of_which_one_is_broken_end_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for step in (1, 2):
        partial = tmp_path / f"checkpoints/.{step}.partial"
        partial.mkdir(parents=True)
        (partial / "state.json").write_text("{}")
        manifest = CheckpointManifest(
            1, 2, "full", {"state.json": FileRecord.of(partial / "state.json")}, step
        )
        commit(partial, step_folder(tmp_path / "checkpoints", step), manifest)
    assert prelora(monkeypatch, "checkpoints", tmp_path) == 0
    (tmp_path / "checkpoints/step-00000002/state.json").unlink()
    capsys.readouterr()
    assert prelora(monkeypatch, "checkpoints", tmp_path) == 1
    broken, whole = capsys.readouterr().out.splitlines()
    assert "BROKEN" in broken and "verified" in whole


def test_the_tools_start_without_torch_and_deepspeed() -> None:
    code = "import sys, prelora_ds.cli; print([m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_shards_are_built_verified_and_indexed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (9, 7)).save(tmp_path / "in" / name / "1.png")
    out = tmp_path / "out"
    assert prelora(monkeypatch, "shards", "build", tmp_path / "in", out, "--quality", "90") == 2
    assert "--quality = 90" in capsys.readouterr().err
    assert prelora(monkeypatch, "shards", "build", tmp_path / "in", out, "--workers", "1") == 0
    assert f"{out}: 2 samples of 2 classes in 1 shards" in capsys.readouterr().out
    assert prelora(monkeypatch, "shards", "verify", out, "--workers", "1") == 0
    (out / "manifest.json").unlink()
    (out / "index.npy").unlink()
    (tmp_path / "names").write_text("cat\ndog\n")
    assert prelora(monkeypatch, "shards", "index", out, "--classes", tmp_path / "names", "--workers", "1") == 0
    shard = out / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    capsys.readouterr()
    assert prelora(monkeypatch, "shards", "verify", out, "--workers", "1") == 1
    said = capsys.readouterr().out
    assert "shard-000000.tar" in said and "1 shards have problems" in said


@pytest.mark.parametrize(("arguments", "key"), [
    (["shards", "build", "", "OUT"], "argument"), (["shards", "build", "SOURCE", ""], "argument"),
    (["shards", "build", "SOURCE", "OUT", "--like="], "--like"), (["export", "", "OUT"], "argument"),
    (["checkpoints", ""], "argument"), (["shards", "verify", ""], "argument"),
    (["evaluate", "m", "--data", ""], "argument"),
])
def test_an_empty_argument_is_not_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prelora(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {key} = ") and "is empty\n" in err and ". is the current folder" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [
    ["shards", "build", "SOURCE", "s3://bucket/OUT"], ["shards", "digits", "gs://bucket/OUT"],
    ["shards", "photographs", "s3://bucket/OUT"], ["export", "RUN", "s3://bucket/OUT"],
    ["shards", "index", "https://host/train", "--out", "s3://bucket/OUT"],
])
def test_a_url_in_the_place_of_a_folder_that_is_written_makes_no_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prelora(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert "is a URL, and this is written to a file system" in err and "OUT = '" in err.upper()
    assert list(tmp_path.iterdir()) == []


# ---- streams that cannot be written

def in_bash(redirections: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`prelora` with its streams as bash makes them of ``redirections``; the code is that of the command itself."""
    command = shlex.join([sys.executable, "-m", "prelora_ds.cli", *map(str, arguments)])
    return subprocess.run(["bash", "-c", f"{command} {redirections}; exit ${{PIPESTATUS[0]}}"], text=True,
                          capture_output=True, timeout=120, check=False)


def source(tmp_path: Path) -> Path:
    for name in ("cat", "dog", "__pycache__"):  # the last is passed over, which is said
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (9, 7)).save(tmp_path / "in" / name / "1.png")
    return tmp_path / "in"


@pytest.mark.parametrize("redirections", ["2>/dev/full", "2>&-", "2> >(head -c 3 >/dev/null)", "2>&1 | true",
                                          ">/dev/full", ">&-", "| true", ">/dev/full 2>&1"])
def test_shards_are_built_and_found_whole_whatever_becomes_of_the_streams(tmp_path: Path, redirections: str) -> None:
    out = tmp_path / "out"
    built = in_bash(redirections, "shards", "build", source(tmp_path), out, "--workers", "1")
    assert built.returncode == 0, built.stderr
    assert (out / "manifest.json").is_file() and not (out / "work").exists()
    if redirections == ">/dev/full":
        assert built.stderr.splitlines()[-1] == \
            "warning: standard output cannot be written (No space left on device); its text is lost"


@pytest.mark.parametrize(("redirections", "code"), [
    ("2>/dev/full", 0), ("2>&-", 0), ("2> >(head -c 3 >/dev/null)", 0), (">&-", 0),
    ("2>&1 | true", 141), ("| true", 141), (">/dev/full", 75), (">/dev/full 2>&1", 75),
])
def test_a_stream_that_is_lost_is_not_told_as_a_shard_that_has_changed(tmp_path: Path, redirections: str,
                                                                       code: int) -> None:
    write_digits(tmp_path)
    # the reader is gone before the first word: the shards take a while, and `true` does not
    assert in_bash(redirections, "shards", "verify", tmp_path / "val", "--workers", "1").returncode == code


def test_an_evaluation_that_is_kept_is_not_to_be_given_again(tmp_path: Path) -> None:
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import prelora_ds.run.evaluate as module\n"
        "from prelora_ds import cli\n"
        "module.evaluate_folder = lambda model, data: module.Result(3, 4, 0.5, str(data), 'x')\n"
        "cli.main()\n")
    command = f"{sys.executable} {script} evaluate {tmp_path} --data d >/dev/full"
    ended = subprocess.run(["bash", "-c", command], text=True, capture_output=True, timeout=120, check=False)
    assert ended.returncode == 0 and json.loads((tmp_path / "accuracy.json").read_text())["correct"] == 3
    assert ended.stderr == "warning: standard output cannot be written (No space left on device); its text is lost\n"


def test_only_what_is_no_path_may_be_empty() -> None:
    """A probe of `prelora supervise` may be none, and its command may have arguments of any kind."""
    refuse_empty(["supervise", "--probe", "", "--nodes", "1", "--", "echo", ""])
    refuse_empty(["supervise", "--probe=", "--", "true"])
    for arguments in (["supervise", "--hostfile", "", "--", "true"], ["supervise", "--hostfile=", "--", "true"],
                      ["shards", "build", "", "OUT"]):
        with pytest.raises(ConfigError, match="is empty"):
            refuse_empty(arguments)
