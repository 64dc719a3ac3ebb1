from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.launcher.runner import _parse_hostfile
from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.errors import ConfigError
from prelora_ds.hosts.hostfile import (
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
def test_a_written_hostfile_is_read_back_by_us_and_by_deepspeed(slots: dict[str, int]) -> None:
    hosts = [Host(name, n) for name, n in slots.items()]
    assert parse_hostfile(format_hostfile(hosts), "hosts") == hosts
    assert dict(_parse_hostfile(format_hostfile(hosts).splitlines())) == slots


@pytest.mark.parametrize("line", ["a", "a slots=", "a slots=4x", "a slots=0", "a slots=-1", "a 4",
                                  "a slots=4 b slots=4", "a,b slots=4", "a;reboot slots=4", "$(x) slots=1",
                                  "a slots = 4"])
def test_an_invalid_line_is_reported_with_file_and_number(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hostfile(f"# all\n\nfirst slots=4\n{line}\n", "hosts")
    assert caught.value.key == "hosts:4" and caught.value.value == line


@pytest.mark.parametrize(("line", "reason"), [
    ("user@host slots=4", "it contains a user"), ("a slots=4 # first", "a comment needs a line of its own"),
    ("a slots=4#x", "a comment needs"), ("a", "slots=N is missing"),
    ("a slots = 4", "the name must be followed by slots=N"), ("a 4", "not by '4'"),
    ("a slots=4 max_slots=8", "not by 'slots=4 max_slots=8'"), ("a:4", "'a:4' is not a valid host name"),
    ("a_ slots=1", "is not a valid host name"), ("x" * 254 + " slots=1", "is not a valid host name"),
    ("a slots=0", "from 1 to 9999"), ("a slots=" + "9" * 5000, "from 1 to 9999"),
    ("a slots=\u0664", "the name must be followed by"), ("a\0 slots=1", "is not a valid host name")])
def test_an_invalid_line_is_refused_with_the_reason(line: str, reason: str) -> None:
    with pytest.raises(ConfigError, match="is not a valid hostfile line") as caught:
        parse_hostfile(f"first slots=4\n{line}\n", "hosts")
    assert reason in caught.value.problem


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfa slots=1\r\nb slots=2\r\n")
    assert read_hostfile(tmp_path / "hosts") == [Host("a", 1), Host("b", 2)]


PIECES = st.sampled_from([
    "a", "b1", "A", "@", "#", " ", "\t", "slots=", "slots=4", "slots=04", "=", "\n", "\r\n", "0", "-",
    "9" * 5000, "\u0664", "\0", "\x85", "\u2028", "[", "]", ",", "1-9", "[1-3]", "[1-99999999999]"])


@given(text=st.lists(PIECES, max_size=12).map("".join) | st.text())
def test_a_damaged_hostfile_is_read_or_refused_with_one_message(text: str) -> None:
    try:
        hosts = parse_hostfile(text, "hosts")
    except ConfigError:
        return
    assert parse_hostfile(format_hostfile(hosts), "hosts") == hosts
    read_by_deepspeed = dict(_parse_hostfile(format_hostfile(hosts).splitlines()))
    assert read_by_deepspeed == {host.name: host.slots for host in hosts}


@given(text=st.lists(PIECES, max_size=12).map("".join) | st.text())
def test_a_damaged_nodelist_is_expanded_or_refused_with_one_message(text: str) -> None:
    try:
        assert 0 < len(expand_nodelist(text)) <= 100_000
    except ConfigError as error:
        assert error.key == "SLURM_NODELIST"


@given(content=st.binary(max_size=30))
def test_arbitrary_bytes_are_read_or_refused_with_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "hosts"
    path.write_bytes(content)
    try:
        read_hostfile(path)
    except ConfigError:
        return


def test_a_duplicate_host_an_empty_file_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="twice"):
        parse_hostfile("a slots=1\na slots=2\n", "hosts")
    with pytest.raises(ConfigError, match="twice"):  # host names are case-insensitive
        parse_hostfile("a slots=1\nA slots=2\n", "hosts")
    with pytest.raises(ConfigError, match="contains no host"):
        parse_hostfile("# nothing\n", "hosts")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "no\0ne")


def test_hosts_are_formatted_for_the_command_line_of_mpi() -> None:
    assert format_mpi_hosts([Host("a", 4), Host("b", 2)]) == "a:4,b:2"


@pytest.mark.parametrize(("text", "hosts"), [
    ("node7", ["node7"]), ("node[01-04,07]", ["node01", "node02", "node03", "node04", "node07"]),
    ("a,b[1,3],c", ["a", "b1", "b3", "c"]), ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
    ("n[098-101].site.gov", ["n098.site.gov", "n099.site.gov", "n100.site.gov", "n101.site.gov"])])
def test_a_slurm_nodelist_is_expanded_in_order(text: str, hosts: list[str]) -> None:
    assert expand_nodelist(text) == hosts


@pytest.mark.parametrize("text", ["", "n[", "n[]", "n[3-1]", "n[1-]", "n[a]", "n[1-99999999999]",
                                  "a[1-999]b[1-999]", "n[" + "9" * 5000 + "]"])
def test_an_invalid_nodelist_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        expand_nodelist(text)


def test_the_environment_file_has_one_variable_per_line(tmp_path: Path) -> None:
    write_ds_env(tmp_path / "env", {"OMP_NUM_THREADS": "1", "FOO": "/a/b:c=d,e"})
    assert (tmp_path / "env").read_text() == "FOO=/a/b:c=d,e\nOMP_NUM_THREADS=1\n"


@pytest.mark.parametrize(("key", "value"), [("A B", "1"), ("1A", "1"), ("A", ""), ("A", "x y"), ("A", "$HOME"),
                                            ("A", "`x`"), ("A", "a\nB=1"), ("A", "{1..3}"), ("A", "a;b")])
def test_a_value_that_the_remote_shell_would_alter_is_refused(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError):
        write_ds_env(tmp_path / "env", {key: value})
    assert not (tmp_path / "env").exists()
