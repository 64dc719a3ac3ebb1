from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.launcher.runner import _parse_hostfile
from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.core.errors import ConfigError
from prelora_ds.launching.hostfile import (
    Host,
    expand_nodelist,
    format_hostfile,
    format_mpi_hosts,
    parse_hostfile,
    read_hostfile,
    write_ds_env,
)

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,8}[a-z0-9])?", fullmatch=True)


@given(st.dictionaries(NAMES, st.integers(1, 64), min_size=1))
def test_what_is_written_is_read_back_by_us_and_by_deepspeed(slots: dict[str, int]) -> None:
    hosts = [Host(name, n) for name, n in slots.items()]
    assert parse_hostfile(format_hostfile(hosts), "hosts") == hosts
    assert dict(_parse_hostfile(format_hostfile(hosts).splitlines())) == slots


@pytest.mark.parametrize("line", ["a", "a slots=", "a slots=4x", "a slots=0", "a slots=-1", "a 4",
                                  "a slots=4 b slots=4", "a,b slots=4", "a;reboot slots=4", "$(x) slots=1",
                                  "a slots = 4"])
def test_a_line_that_is_none_is_named_with_file_and_number(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hostfile(f"# all\n\nfirst slots=4\n{line}\n", "hosts")
    assert caught.value.key == "hosts:4" and caught.value.value == line


def test_a_host_twice_no_host_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="twice"):
        parse_hostfile("a slots=1\na slots=2\n", "hosts")
    with pytest.raises(ConfigError, match="names no host"):
        parse_hostfile("# nothing\n", "hosts")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


def test_mpi_takes_the_same_hosts_on_its_command_line() -> None:
    assert format_mpi_hosts([Host("a", 4), Host("b", 2)]) == "a:4,b:2"


@pytest.mark.parametrize(("text", "hosts"), [
    ("node7", ["node7"]), ("node[01-04,07]", ["node01", "node02", "node03", "node04", "node07"]),
    ("a,b[1,3],c", ["a", "b1", "b3", "c"]), ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
    ("n[098-101].site.gov", ["n098.site.gov", "n099.site.gov", "n100.site.gov", "n101.site.gov"])])
def test_a_slurm_nodelist_is_expanded_in_order(text: str, hosts: list[str]) -> None:
    assert expand_nodelist(text) == hosts


@pytest.mark.parametrize("text", ["", "n[", "n[]", "n[3-1]", "n[1-]", "n[a]"])
def test_a_nodelist_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        expand_nodelist(text)


def test_the_environment_file_is_one_variable_a_line(tmp_path: Path) -> None:
    write_ds_env(tmp_path / "env", {"OMP_NUM_THREADS": "1", "FOO": "/a/b:c=d,e"})
    assert (tmp_path / "env").read_text() == "FOO=/a/b:c=d,e\nOMP_NUM_THREADS=1\n"


@pytest.mark.parametrize(("key", "value"), [("A B", "1"), ("1A", "1"), ("A", ""), ("A", "x y"), ("A", "$HOME"),
                                            ("A", "`x`"), ("A", "a\nB=1"), ("A", "{1..3}"), ("A", "a;b")])
def test_what_the_remote_shell_would_change_is_refused(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError):
        write_ds_env(tmp_path / "env", {key: value})
    assert not (tmp_path / "env").exists()
