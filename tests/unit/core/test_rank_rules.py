from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.core.rank_rules.prelora import assign_ranks

# Away from subnormals, where scaling by a power of two is no longer exact.
CHANGE = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
FAMILY = st.dictionaries(st.integers(0, 40), CHANGE, min_size=1, max_size=12)
FAMILIES = st.dictionaries(st.sampled_from(["q", "k", "v", "o", "fc1", "fc2"]), FAMILY, min_size=1)
BOUNDS = st.tuples(st.integers(0, 8), st.integers(0, 8)).map(lambda pair: (1 << min(pair), 1 << max(pair)))


def ranks_of(changes: list[float], r_min: int = 8, r_max: int = 64) -> list[int]:
    ranks = assign_ranks({"q": dict(enumerate(changes))}, r_min=r_min, r_max=r_max)["q"]
    assert sorted(ranks) == list(range(len(changes)))
    return [ranks[layer] for layer in range(len(changes))]


@pytest.mark.parametrize(("changes", "expected"), [
    ([0, .25, .2500001, .5, .75, .76, 1], [8, 8, 16, 16, 32, 64, 64]),
    ([.10, .15, .20, .30, .40, .50], [8, 8, 8, 16, 32, 64]),
    ([-.4, -.1, .1, .3], [64, 8, 8, 32]),
    ([.7, .7, .7], [8, 8, 8]),
    ([0, 0], [8, 8]),
    ([.3, -.3], [8, 8]),
    ([12.5], [8]),
])
def test_vectors(changes: list[float], expected: list[int]) -> None:
    assert ranks_of(changes) == expected


def test_float_noise_does_not_buy_the_next_rank() -> None:
    # (.4 - .1) / (.5 - .1) * 4 is slightly above 3 in binary, and 3 belongs to the third of the four ranks.
    assert (.4 - .1) / (.5 - .1) * 4 > 3
    assert ranks_of([.1, .4, .5])[1] == 32


def test_one_candidate_rank() -> None:
    assert ranks_of([.1, .2, .9], r_min=16, r_max=16) == [16, 16, 16]


def test_each_family_is_scaled_by_itself() -> None:
    changes = {"q": {0: .1, 1: .2}, "v": {0: 10, 3: 20}}
    assert assign_ranks(changes, r_min=8, r_max=64) == {"q": {0: 8, 1: 64}, "v": {0: 8, 3: 64}}


@pytest.mark.parametrize(("r_min", "r_max", "message"), [
    (6, 64, "r_min 6 is not a power of two"), (8, 48, "r_max 48 is not a power of two"),
    (0, 64, "r_min 0 is not a power of two"), (-8, 64, "r_min -8 is not a power of two"),
    (64, 8, "r_min 64 is larger than r_max 8"),
])
def test_bad_bounds(r_min: int, r_max: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign_ranks({"q": {0: .1}}, r_min=r_min, r_max=r_max)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layers", [{0: .1, 7: None}, {7: None, 0: .1}, {7: None}])
def test_changes_that_are_not_finite(bad: float, layers: dict[int, float | None]) -> None:
    changes = {layer: bad if change is None else change for layer, change in layers.items()}
    with pytest.raises(ValueError, match=r"v\.07"):
        assign_ranks({"q": {0: .1}, "v": changes}, r_min=8, r_max=64)


def test_family_without_layers() -> None:
    with pytest.raises(ValueError, match="family v has no layers"):
        assign_ranks({"q": {0: .1}, "v": {}}, r_min=8, r_max=64)


@given(FAMILIES, BOUNDS)
def test_bounded_powers_of_two_monotone_and_ends(changes: dict[str, dict[int, float]], bounds: tuple[int, int]) -> None:
    r_min, r_max = bounds
    ranks = assign_ranks(changes, r_min=r_min, r_max=r_max)
    assert {family: set(layers) for family, layers in ranks.items()} == {f: set(c) for f, c in changes.items()}
    for family, layers in changes.items():
        by_change = [ranks[family][layer] for layer in sorted(layers, key=lambda layer: (layers[layer], layer))]
        assert all(r_min <= rank <= r_max and rank.bit_count() == 1 for rank in by_change)
        assert by_change == sorted(by_change)
        # Equal changes get equal ranks.
        assert len({(layers[layer], ranks[family][layer]) for layer in layers}) == len(set(layers.values()))
        assert by_change[0] == r_min
        assert by_change[-1] == (r_max if min(layers.values()) < max(layers.values()) else r_min)


@given(FAMILIES, BOUNDS, st.data())
def test_order_free_and_deterministic(
    changes: dict[str, dict[int, float]], bounds: tuple[int, int], data: st.DataObject
) -> None:
    r_min, r_max = bounds
    shuffled = {family: dict(data.draw(st.permutations(list(changes[family].items()))))
                for family in data.draw(st.permutations(list(changes)))}
    expected = assign_ranks(changes, r_min=r_min, r_max=r_max)
    assert assign_ranks(shuffled, r_min=r_min, r_max=r_max) == expected
    assert assign_ranks(changes, r_min=r_min, r_max=r_max) == expected


@given(FAMILY, BOUNDS, st.integers(-40, 40), st.booleans())
def test_scale_free(changes: dict[int, float], bounds: tuple[int, int], exponent: int, negate: bool) -> None:
    r_min, r_max = bounds
    factor = -2.0**exponent if negate else 2.0**exponent
    scaled = {layer: change * factor for layer, change in changes.items()}
    assert (assign_ranks({"q": scaled}, r_min=r_min, r_max=r_max)
            == assign_ranks({"q": changes}, r_min=r_min, r_max=r_max))
