"""How preflight reports hosts that cannot be asked; tests/hosts checks the rest on real hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from prelora_ds.errors import ConfigError
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
