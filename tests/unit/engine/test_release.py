"""Clearing DeepSpeed's own caches; tests/ranks/test_rebuild.py releases complete engines."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import Init

from prelora_ds.engine.release import clear_cache, restore_linear


def hidden(function: Callable[[int], int]) -> Callable[[int], int]:
    """Hide the attributes of ``function``, like DeepSpeed's decorator instrument_w_nvtx."""

    def wrapper(number: int) -> int:
        return function(number)

    return wrapper


@pytest.mark.parametrize("decorate", [lambda function: function, hidden], ids=["plain", "hidden"])
def test_a_cache_is_cleared_also_behind_a_decorator(
    decorate: Callable[..., Callable[[int], int]],
) -> None:
    calls = []

    def double(number: int) -> int:
        calls.append(number)
        return 2 * number

    method = decorate(functools.lru_cache(maxsize=None)(double))
    method(1)
    method(1)
    assert calls == [1]
    clear_cache(method)
    assert method(1) == 2 and calls == [1, 1]


def test_a_deepspeed_version_whose_method_has_no_cache_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"does not support DeepSpeed [0-9.]+: .*hidden.* has no cache"
    ):
        clear_cache(hidden(lambda number: number))


def test_the_linear_that_stage_3_replaces_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", original)
    monkeypatch.setattr(partition_parameters, "print_rank_0", lambda *_, **__: None)
    Init._enable_mem_efficient_linear(object.__new__(Init))
    assert torch.nn.functional.linear is not original
    restore_linear()
    assert torch.nn.functional.linear is original
    restore_linear()
    assert torch.nn.functional.linear is original
