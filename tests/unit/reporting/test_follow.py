"""Following a log that another process writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.reporting.follow import LogFollower


def news(follower: LogFollower) -> tuple[bool, list[dict[str, Any]]]:
    replaced, rows = follower.read()
    return replaced, list(rows)


def test_rows_come_once_and_a_torn_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower = LogFollower(path)
    assert news(follower) == (False, [])
    path.write_text('{"a": 1}\n{"a": 2')
    assert news(follower) == (False, [{"a": 1}])
    assert news(follower) == (False, [])
    with path.open("a") as file:
        file.write('3}\n{"a": 4}\n')
    assert news(follower) == (False, [{"a": 23}, {"a": 4}])
    assert follower.damaged == []


def test_a_log_that_was_replaced_cut_back_or_removed_begins_again(tmp_path: Path) -> None:
    path, other = tmp_path / "log", tmp_path / "other"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    follower = LogFollower(path)
    news(follower)
    other.write_text('{"a": 1}\n{"b": 2}\n{"b": 3}\n')
    os.replace(other, path)
    assert news(follower) == (True, [{"a": 1}, {"b": 2}, {"b": 3}]), "longer than before, but another file"
    path.write_text('{"a": 1}\n')
    assert news(follower) == (True, [{"a": 1}])
    path.unlink()
    assert news(follower) == (True, [])
    assert news(follower) == (False, [])
    path.write_text('{"a": 5}\n')
    assert news(follower) == (False, [{"a": 5}])


def test_lines_that_are_not_json_objects_are_passed_over_and_named(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"a": 1}\nnonsense\n[1]\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"a": 2}\n')
    follower = LogFollower(path)
    assert news(follower) == (False, [{"a": 1}, {"a": 2}])
    assert follower.damaged == [2, 3, 4, 5]


@given(rows=st.lists(st.dictionaries(st.text(max_size=3), st.integers()), max_size=20), data=st.data())
def test_the_same_rows_however_the_file_grows(tmp_path_factory: Any, rows: list[dict[str, int]], data: Any) -> None:
    path = tmp_path_factory.mktemp("grow") / "log"
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    follower = LogFollower(path)
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        with path.open("ab") as file:
            file.write(content[start:end])
        replaced, new = news(follower)
        assert not replaced
        found += new
    assert found == rows
