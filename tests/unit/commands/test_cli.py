"""`prelora` as a user meets it: one message for a mistake, and exit code 2."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.histories import write_history
from typer.main import get_command

from prelora_ds import cli
from prelora_ds.commands.output import refuse_empty
from prelora_ds.data.shards.writer import write_digits
from prelora_ds.errors import ConfigError
from prelora_ds.run.checkpoints.checkpoint_folder import CheckpointManifest, FileRecord, commit, step_folder
from prelora_ds.run.folder import RunFolder

RECIPE = Path(__file__).parents[3] / "launch/recipes/vit_tiny_debug.yaml"


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
    assert err == (f"error: RUN = {str(tmp_path)!r}: does not contain a run\n"
                   "  remedy: pass the run.output_dir of a run\n")


def test_a_data_folder_that_is_missing_is_told_by_its_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert prelora(monkeypatch, "evaluate", tmp_path, "--data", tmp_path / "none") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --data = {str(tmp_path / 'none')!r}: no such folder\n  remedy: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["no-such-command"], ["report"], ["report", "a", "--out"],
                                       ["shards", "imagenet"], ["shards", "digits", "x", "--samples-per-shard", "0"]])
def test_a_command_line_that_is_wrong_ends_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert prelora(monkeypatch, *arguments) == 2
    assert "Error" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_the_commands(option: str, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert prelora(monkeypatch, option) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("shards", "plan", "evaluate", "report"))
    assert prelora(monkeypatch, "shards", "build", option) == 0
    assert "--samples-per-shard" in capsys.readouterr().out


def test_every_option_and_argument_has_a_help_text() -> None:
    def without_help(command: Any, path: str) -> list[str]:
        missing = [f"{path} {p.name}" for p in command.params if not getattr(p, "help", None)]
        for name, below in getattr(command, "commands", {}).items():
            missing += without_help(below, f"{path} {name}")
        return missing

    assert without_help(get_command(cli.app), "prelora") == []


def test_the_version_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert prelora(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"prelora_ds {metadata.version('prelora_ds')}\n"


def test_debug_prints_the_traceback_before_the_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    assert prelora(monkeypatch, "--debug", "report", tmp_path) == 2
    err = capsys.readouterr().err
    message = f"error: RUN = {str(tmp_path)!r}: does not contain a run"
    assert err.startswith("Traceback") and message in err.splitlines()


@pytest.mark.parametrize("option", ["--deepspeed-config", "--deepspeed_config"])
@pytest.mark.parametrize("command", [["plan"], ["calibrate", "OUT"], ["preflight", "--hostfile", "HOSTS", "--recipe"],
                                     ["job", "--profile", "slurm"]])
def test_both_spellings_of_the_deepspeed_config_are_accepted(
        command: list[str], option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        tmp_path: Path) -> None:
    """The file is missing, which is reported under its key and not as an unknown option."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n")
    words = [str(hosts) if word == "HOSTS" else str(tmp_path / "o") if word == "OUT" else word for word in command]
    words = [words[0], RECIPE, *words[1:]] if "--recipe" not in words else [*words, RECIPE]
    assert prelora(monkeypatch, *words, option, tmp_path / "none.json") == 2
    assert "none.json" in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize("command", [["report"], ["plan"]])
def test_tables_fold_at_80_columns_and_have_no_escape_codes_in_a_pipe(command: list[str], tmp_path: Path) -> None:
    if command == ["report"]:
        phases = [RUN["events.jsonl"] | {"step": n, "phase": f"phase_{n}"} for n in range(12)]
        steps = [RUN["metrics.jsonl"] | {"step": n + 1} for n in range(12)]
        for name, rows in (("events", phases), ("metrics", steps)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["report", str(tmp_path)]
    else:
        command = ["plan", str(RECIPE)]
    environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    done = subprocess.run([sys.executable, "-m", "prelora_ds.cli", *command], capture_output=True, text=True,
                          check=True, env=environ)
    tables = [line for line in done.stdout.splitlines() if line[:1] in "┏┃┡│└"]
    assert len(tables) > 10 and max(map(len, tables)) <= 80
    assert "\x1b" not in done.stdout + done.stderr
    if command[0] == "report":
        assert all(f" phase_{n} " in done.stdout for n in range(12))


@pytest.mark.parametrize("no_color", [True, False])
def test_no_color_is_respected_on_a_terminal(no_color: bool) -> None:
    ours, theirs = os.openpty()
    environ = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environ |= {"TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if no_color else {})
    child = subprocess.Popen([sys.executable, "-m", "prelora_ds.cli", "--help"], stdout=theirs, stderr=theirs,
                             env=environ)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    assert child.wait(timeout=60) == 0 and b"shards" in shown
    colored = re.search(rb"\x1b\[[\d;]*3\dm", shown) is not None
    assert colored != no_color


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
    assert err.startswith(f"error: {key} = ") and "is empty\n" in err and "write . for the current folder" in err
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
    assert "is a URL, but the output must be a local folder" in err and "OUT = '" in err.upper()
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


def commands() -> dict[str, Any]:
    """Each command by its words: ``report``, ``shards build``."""
    found = {}
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        subcommands = getattr(command, "commands", None)
        found |= {name: command} if subcommands is None else {f"{name} {sub}": c for sub, c in subcommands.items()}
    return found


@pytest.mark.parametrize("words", sorted(commands()))
def test_the_example_in_the_help_of_a_command_is_one_that_it_takes(words: str) -> None:
    """It is parsed as the command line would parse it, without running the command."""
    command = commands()[words]
    (example,) = re.findall(r"Example: (prelora .*)", " ".join((command.help or "").split()))
    prefix = ["prelora", *words.split()]
    arguments = shlex.split(example)
    assert arguments[: len(prefix)] == prefix
    context = command.make_context(words, arguments[len(prefix) :])
    assert any(value not in (None, False, (), []) for value in context.params.values())


def test_a_report_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_history(RunFolder(tmp_path / "out"), "vit_large_in1k")
    (tmp_path / "out/events.jsonl").write_text(json.dumps(
        {"event": "plan", "step": 0, "phase": "full", "reason": "training begins", "trainable_parameters": 5,
         "switch": None}) + "\n")
    assert prelora(monkeypatch, "report", tmp_path / "out", "--json") == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["run"] == "out" and run["finals"]["steps"] == 93_836
    assert prelora(monkeypatch, "report", tmp_path / "out", "--json", "--out", tmp_path / "new") == 2
    assert "choose one" in capsys.readouterr().err and not (tmp_path / "new").exists()
