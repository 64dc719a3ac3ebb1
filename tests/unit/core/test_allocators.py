"""The rules that choose adapters: the vectors of the paper, and what must hold for any importance."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.core.allocators import NAMES, select
from prelora_ds.core.allocators.unconverged import unconverged

PAPER = {"0": 0.5, "1": 0.3, "2": 0.2}


def chosen(name: str, importance: dict[str, float] = PAPER, seed: int = 0, **parameters: Any) -> set[str]:
    return set(select(name, importance, rng=random.Random(seed), **parameters))


def shares(name: str, draws: int = 4000, **parameters: Any) -> dict[str, float]:
    """How often each adapter is chosen when one is."""
    counts = Counter(next(iter(chosen(name, seed=seed, k=1, **parameters))) for seed in range(draws))
    return {adapter: counts[adapter] / draws for adapter in PAPER}


@pytest.mark.parametrize(("share", "expected"), [(0.4, "0"), (0.5, "0"), (0.7, "01"), (0.8, "01"), (1.0, "012")])
def test_threshold_takes_the_fewest_that_reach_the_share(share: float, expected: str) -> None:
    assert chosen("threshold", share=share) == set(expected)
    assert chosen("threshold", {a: 7 * v for a, v in PAPER.items()}, share=share) == set(expected), "normalised"


def test_top_k_takes_the_most_important_and_equal_ones_in_alphabetical_order() -> None:
    assert chosen("top_k", k=2) == {"0", "1"}
    assert chosen("top_k", {"b": 1.0, "a": 1.0, "c": 2.0}, k=2) == {"c", "a"}
    assert chosen("top_k", share=0.4) == {"0", "1"}, "a share of the adapters is rounded up"
    assert chosen("top_k", share=2 / 3) == {"0", "1"}


def test_stochastic_draws_in_proportion_to_importance() -> None:
    assert shares("stochastic") == pytest.approx(PAPER, abs=0.03)


def test_discounted_draws_in_proportion_to_importance_per_update() -> None:
    found = shares("discounted", updates={"0": 10, "1": 2, "2": 1})
    assert found == pytest.approx({"0": 0.125, "1": 0.375, "2": 0.5}, abs=0.03)
    never = shares("discounted", updates={})
    assert never == pytest.approx(PAPER, abs=0.03), "an adapter without an update counts as one with one update"


def test_random_ignores_importance() -> None:
    assert shares("random") == pytest.approx(dict.fromkeys(PAPER, 1 / 3), abs=0.03)


def test_stochastic_takes_adapters_without_importance_last() -> None:
    importance = {"a": 0.0, "b": 1.0, "c": 0.0, "d": 1e-9}
    for seed in range(50):
        assert {"b", "d"} <= chosen("stochastic", importance, seed, k=3)


@given(
    importance=st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0, allow_infinity=False), min_size=1,
                               max_size=12),
    name=st.sampled_from(NAMES),
    share=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**32),
)
def test_any_rule_chooses_some_of_the_adapters_and_the_same_on_every_rank(
        importance: dict[str, float], name: str, share: float, seed: int) -> None:
    parameters: dict[str, Any] = {"share": share, "updates": {} if name == "discounted" else None}
    first = chosen(name, importance, seed, **parameters)
    assert first and first <= set(importance)
    reordered = dict(sorted(importance.items(), reverse=True))
    assert chosen(name, reordered, seed, **parameters) == first
    if name != "threshold":
        k = len(first)
        assert chosen(name, importance, seed, k=k, updates=parameters["updates"]) == first


@pytest.mark.parametrize(("name", "parameters", "problem"), [
    ("top", {"k": 1}, "did you mean 'top_k'"),
    ("nothing like it", {"k": 1}, "the rules are top_k, stochastic, discounted, random, threshold"),
    ("top_k", {}, "either k or share"),
    ("top_k", {"k": 1, "share": 0.5}, "either k or share"),
    ("top_k", {"k": 4}, "k = 4 is not between 1 and 3"),
    ("random", {"k": 0}, "k = 0 is not between 1 and 3"),
    ("random", {"share": 0.0}, "share = 0.0 is not in"),
    ("threshold", {"share": 1.5}, "share = 1.5 is not in"),
    ("threshold", {"share": float("nan")}, "share = nan is not in"),
    ("threshold", {"k": 2}, "threshold needs a share"),
    ("discounted", {"k": 2}, "needs the number of updates"),
])
def test_parameters_that_cannot_work_are_refused(name: str, parameters: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        chosen(name, **parameters)


@pytest.mark.parametrize("importance", [{}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}])
def test_importance_that_means_nothing_is_refused(importance: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"importance|no adapters"):
        chosen("random", importance, k=1)


# ---- progressive freezing

def test_converged_adapters_leave_from_the_bottom() -> None:
    changes = [("a", 0.1), ("b", 0.2), ("c", 3.0), ("d", 0.1), ("e", 5.0)]
    assert unconverged(changes, 1.0) == {"c", "d", "e"}, "d has converged too, but above c"
    assert unconverged(changes, 0.15) == {"b", "c", "d", "e"}
    assert unconverged(changes, 0.05) == {"a", "b", "c", "d", "e"}


def test_a_change_of_exactly_tau_has_converged_and_one_that_is_not_finite_has_not() -> None:
    assert unconverged([("a", 1.0), ("b", math.nan), ("c", 0.0)], 1.0) == {"b", "c"}
    assert unconverged([("a", math.inf), ("b", 0.0)], 1.0) == {"a", "b"}


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.floats(0.1, 9), st.floats(0.1, 9))
def test_the_last_adapter_always_trains_and_a_larger_tau_frees_more(sizes: list[float], low: float,
                                                                    high: float) -> None:
    changes = list(enumerate(sizes))
    few, many = (unconverged([(str(i), change) for i, change in changes], tau) for tau in sorted((low, high))[::-1])
    assert str(len(sizes) - 1) in few <= many


@pytest.mark.parametrize(("changes", "tau", "said"), [([], 1.0, "no adapters"), ([("a", 1.0)], 0.0, "not positive"),
                                                      ([("a", 1.0)], math.nan, "not positive")])
def test_nothing_to_choose_from_and_a_limit_that_is_none_are_errors(changes: list[tuple[str, float]], tau: float,
                                                                    said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unconverged(changes, tau)
