"""How preflight reports hosts that cannot be asked; tests/hosts checks the rest on real hosts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.pool import free_port

from prelora_ds.errors import ConfigError
from prelora_ds.hosts.hostcheck import ROUNDS, facts, rate
from prelora_ds.hosts.hostfile import Host
from prelora_ds.hosts.preflight import Checks, _HostSession, run_preflight


def test_a_host_whose_ssh_ended_before_it_was_asked_reports_what_ssh_printed() -> None:
    session = _HostSession("a", "bash -c 'echo no route to {host} >&2; exit 255'")
    session.process.wait()
    assert session.ask("facts", 5.0) == {"error": "no route to a"}
    session.close()


def test_hosts_that_all_fail_give_a_report_not_a_crash(tmp_path: Path) -> None:
    report = run_preflight([Host("a", 1), Host("b", 1)], Checks(folder=tmp_path, ssh="false"))
    assert not report.ok and all("unreachable" in " ".join(said) for said in report.problems.values())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ssh", ["/nowhere/ssh {host}", "ssh '{host}"])
def test_an_ssh_command_that_cannot_be_started_is_a_config_error(tmp_path: Path, ssh: str) -> None:
    with pytest.raises(ConfigError, match="--ssh = "):
        run_preflight([Host("a", 1)], Checks(folder=tmp_path, ssh=ssh))


def test_a_rate_counts_every_byte_and_the_wait_for_the_last_one() -> None:
    data = torch.ones(1 << 10)
    calls = []

    def transfer() -> None:
        calls.append(time.monotonic())
        time.sleep(0.01)

    measured = rate(transfer, data, 2)
    assert len(calls) == ROUNDS + 1  # the first one is a warm-up
    assert 0 < measured <= 2 * data.nbytes / 0.01 / 1e6


def test_two_hosts_measure_a_correct_all_reduce() -> None:
    """Two processes, of one host here, that answer as the ones of a preflight do."""
    port = free_port()
    processes = [subprocess.Popen([sys.executable, "-m", "prelora_ds.hosts.hostcheck"], text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for rank, asked in enumerate(processes):
        assert asked.stdin is not None
        question = {"ask": "all_reduce", "rank": rank, "world": 2, "master": "127.0.0.1", "port": port,
                    "interface": None, "limit_s": 60.0}
        asked.stdin.write(json.dumps(question) + "\n")
        asked.stdin.close()
    for asked in processes:
        assert asked.stdout is not None
        answer = json.loads(asked.stdout.read())
        assert answer["correct"] and answer["all_reduce_mb_s"] > 0 and len(answer["neighbours_mb_s"]) == 2
        assert asked.wait() == 0


def test_a_host_whose_gpu_torch_cannot_use_fails_its_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    with pytest.raises(ConfigError, match=r"accelerator = 'SLURM_JOB_GPUS=0,1': there is a GPU here"):
        facts({"disks": [], "shards": [], "token": "-", "interface": None, "extensions": []})
