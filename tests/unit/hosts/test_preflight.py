"""What preflight makes of hosts that cannot be asked; the rest is asked of real hosts, in tests/hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from prelora_ds.errors import ConfigError
from prelora_ds.hosts.hostfile import Host
from prelora_ds.hosts.preflight import Questions, _Line, preflight


def test_a_host_whose_ssh_ended_before_it_was_asked_is_not_reachable() -> None:
    line = _Line("a", "bash -c 'echo no route to {host} >&2; exit 255'")
    line.process.wait()
    assert line.ask("facts", 5.0) == {"error": "no route to a"}
    line.close()


def test_hosts_that_all_fail_are_a_report_and_no_crash(tmp_path: Path) -> None:
    report = preflight([Host("a", 1), Host("b", 1)], Questions(folder=tmp_path, ssh="false"))
    assert not report.fit and all("not reachable" in " ".join(said) for said in report.problems.values())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ssh", ["/nowhere/ssh {host}", "ssh '{host}"])
def test_an_ssh_that_cannot_be_started_is_the_user_s_mistake(tmp_path: Path, ssh: str) -> None:
    with pytest.raises(ConfigError, match="--ssh = "):
        preflight([Host("a", 1)], Questions(folder=tmp_path, ssh=ssh))
