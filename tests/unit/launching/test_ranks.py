from __future__ import annotations

import pytest

from prelora_ds.core.errors import ConfigError
from prelora_ds.launching.ranks import Ranks, discover_ranks

ENVIRON = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "a"}


def mistake(environ: dict[str, str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        discover_ranks(environ)
    assert caught.value.key == "environment"
    return caught.value


def test_ranks_are_read_from_the_environment() -> None:
    assert discover_ranks(ENVIRON) == Ranks(rank=5, local_rank=1, world_size=8)


def test_a_process_alone_is_rank_0_of_1() -> None:
    assert discover_ranks({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}) == Ranks(0, 0, 1)


@pytest.mark.parametrize("missing", [["RANK"], ["LOCAL_RANK"], ["WORLD_SIZE"], ["RANK", "WORLD_SIZE"],
                                     ["RANK", "LOCAL_RANK", "WORLD_SIZE"]])
def test_what_is_missing_is_named_with_the_command_that_starts_a_run(missing: list[str]) -> None:
    error = mistake({key: value for key, value in ENVIRON.items() if key not in missing})
    assert error.value == ", ".join(missing)
    assert "was not launched" in error.problem
    assert "deepspeed launch/pretrain.py" in error.remedy


@pytest.mark.parametrize("key", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("text", ["", "one", "1.5"])
def test_a_rank_that_is_no_number_is_refused_with_all_three(key: str, text: str) -> None:
    error = mistake(ENVIRON | {key: text})
    assert error.problem == "a rank is no number"
    assert error.value == {k: (ENVIRON | {key: text})[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


@pytest.mark.parametrize("odd", [{"RANK": "8"}, {"WORLD_SIZE": "5"}, {"LOCAL_RANK": "6"}, {"LOCAL_RANK": "-1"},
                                 {"RANK": "-1", "LOCAL_RANK": "-1"}, {"WORLD_SIZE": "0"}])
def test_ranks_that_contradict_each_other_are_refused(odd: dict[str, str]) -> None:
    error = mistake(ENVIRON | odd)
    assert error.problem == "ranks contradict each other"
    assert "LOCAL_RANK <= RANK < WORLD_SIZE" in error.remedy
