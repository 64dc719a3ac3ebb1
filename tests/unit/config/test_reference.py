"""The configuration reference in docs/config.md."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from prelora_ds.config.changes import MAY_DIFFER, MAY_DIFFER_IN_A_NEW_RUN
from prelora_ds.config.fields import DurationField, Positive, Seconds, Share
from prelora_ds.config.reference import all_keys, in_words, reference

PAGE = Path(__file__).parents[3] / "docs/config.md"


def test_the_committed_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_every_key_is_on_the_page() -> None:
    page = reference()
    paths = [key.path for key in all_keys()]
    assert len(paths) > 100
    repeated = {path for path, count in Counter(paths).items() if count > 1}
    several = ("phases.*.adapters.ranks.", "phases.*.until.")
    assert all(path.startswith(several) for path in repeated), "only rules and tests have keys of the same name"
    assert [path for path in paths if f"**`{path}`**" not in page and f"## {path}\n" not in page] == []
    leaves = [key.path for key in all_keys() if not key.sections]
    assert [path for path in leaves if f"`{path}`" not in page] == []
    for path in ("phases.lora.zero_stage", "phases.*.adapters.from", "phases.*.until.tau", "checkpoint.async"):
        assert path in leaves


@pytest.mark.parametrize("key", all_keys(), ids=lambda key: key.path)
def test_every_description_is_a_sentence(key: object) -> None:
    description = key.description  # type: ignore[attr-defined]
    assert re.fullmatch(r"[A-Z\[`].{10,}\.", description), description


def test_every_key_that_may_change_is_a_key() -> None:
    paths = {key.path for key in all_keys()}
    assert set(MAY_DIFFER) | set(MAY_DIFFER_IN_A_NEW_RUN) <= paths


def test_a_key_says_whether_it_may_change() -> None:
    page = reference()
    assert re.search(r"\*\*`run\.seed`\*\* \([^)]*; default `0`\)", page)
    assert re.search(r"\*\*`train\.log_every`\*\* \([^)]*may change on resume\)", page)
    assert re.search(r"\*\*`optimizer\.lr`\*\* \([^)]*may change in a fork\)", page)


def test_types_are_in_words() -> None:
    assert in_words(Positive) == "an integer > 0"
    assert in_words(Share) == "a number >= 0 and < 1"
    assert in_words(Seconds | None) == "a time or `null`"
    assert in_words(tuple[DurationField, ...]) == "a list (each entry is a duration)"
