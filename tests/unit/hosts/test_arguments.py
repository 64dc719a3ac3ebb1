"""The command line of launch/pretrain.py, as a rank and `prelora supervise` parse it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prelora_ds.commands.supervise import config_of
from prelora_ds.errors import ConfigError
from prelora_ds.hosts.arguments import parse_arguments, supervised_folder
from prelora_ds.hosts.heartbeat import read_json

RECIPE = "launch/recipes/vit_tiny_debug.yaml"
SETTINGS = ["run.output_dir=o", "data.train=t", "data.val=v"]


def test_options_and_overrides_may_come_in_any_order() -> None:
    assert parse_arguments(["--recipe", RECIPE, "--deepspeed-config", "x"]).deepspeed_config == "x"
    args = parse_arguments(["--local_rank=1", "a.b=1", "--recipe", RECIPE, "c=[1, 2]", "--deepspeed_config=x",
                            "d.e=f=g"])
    assert (args.recipe, args.deepspeed_config, args.local_rank, args.resume) == (RECIPE, "x", 1, "auto")
    assert args.overrides == ["a.b=1", "c=[1, 2]", "d.e=f=g"]


@pytest.mark.parametrize("words", [["a=1"], ["--recipe", RECIPE, "--deepspeed", "x"], ["--recipe"],
                                   ["--recipe", RECIPE, "--deepspeed", "x"]])
def test_a_usage_error_is_reported_with_the_command_line(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="command line = '" + " ".join(words)):
        parse_arguments(words)


def test_the_supervisor_parses_the_command_as_the_ranks_do() -> None:
    launcher = ["mpirun", "-n", "{ranks}", "--mca", "x", "1", "python", "launch/pretrain.py"]
    config = config_of([*launcher, "--recipe", RECIPE, "--deepspeed_config=ds_configs/zero2.json", *SETTINGS])
    assert config.zero.stage == 2 and config.run.output_dir == "o"
    with pytest.raises(ConfigError, match="unrecognized arguments: --deepspeed"):
        config_of([*launcher, "--recipe", RECIPE, "--deepspeed", "ds_configs/zero2.json", *SETTINGS])
    assert config_of([*launcher[:-1], "bind.py", launcher[-1], f"--recipe={RECIPE}", *SETTINGS]).zero.stage == 0
    with pytest.raises(ConfigError, match=r"COMMAND = 'mpirun python': does not contain"):
        config_of(["mpirun", "python"])


LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(("ranks", "words", "why"), [
    (LAUNCHED, ["--recipe", RECIPE, "--unknown"], "unrecognized arguments: --unknown"),
    ({}, ["--recipe", RECIPE], "this process was not started by a launcher")])
def test_a_rank_records_a_usage_error_for_its_supervisor_before_it_prints(
        tmp_path: Path, ranks: dict[str, str], words: list[str], why: str) -> None:
    attempt_dir = tmp_path / "attempt-1"
    attempt_dir.mkdir()
    command = [sys.executable, "launch/pretrain.py", *words, "--supervised", str(attempt_dir)]
    assert supervised_folder(command[2:]) == attempt_dir
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={"PATH": os.environ["PATH"]} | ranks)
    assert process.stderr is not None
    while not list(attempt_dir.glob("exit-*.json")):  # the rank waits for rank 0 to print before it exits
        assert process.poll() is None or list(attempt_dir.glob("exit-*.json"))
    record, = map(read_json, attempt_dir.glob("exit-*.json"))
    process.kill()
    process.communicate()
    assert record["code"] == 2 and why in record["why"]
    assert record["rank"] == (int(ranks["RANK"]) if ranks else None)


def test_the_help_needs_no_launcher() -> None:
    done = subprocess.run([sys.executable, "launch/pretrain.py", "--help"], capture_output=True, text=True, check=True,
                          env={"PATH": os.environ["PATH"]})
    assert "--deepspeed_config" in done.stdout and "launch/recipes/digits_demo.yaml \\\n" in done.stdout
