from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.core.rank_rules.energy import EnergyRanks
from prelora_ds.core.rank_rules.prelora import Changes, PreloraRanks, assign_ranks
from prelora_ds.core.rank_rules.random import RandomRanks
from prelora_ds.core.rank_rules.settled import without_settled
from prelora_ds.core.rank_rules.stable_rank import StableRanks
from prelora_ds.core.spectra import Spectrum
from prelora_ds.core.switch_tests.prelora import WindowStats

# Away from subnormals, where scaling by a power of two is no longer exact.
CHANGE = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
FAMILY = st.dictionaries(st.integers(0, 40), CHANGE, min_size=1, max_size=12)
FAMILIES = st.dictionaries(st.sampled_from(["q", "k", "v", "o", "fc1", "fc2"]), FAMILY, min_size=1)
BOUNDS = st.tuples(st.integers(0, 8), st.integers(0, 8)).map(lambda pair: (1 << min(pair), 1 << max(pair)))


def ranks_of(changes: list[float], r_min: int = 8, r_max: int = 64, by: Changes = "abs") -> list[int]:
    ranks = assign_ranks({"q": dict(enumerate(changes))}, r_min=r_min, r_max=r_max, by=by)["q"]
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


@pytest.mark.parametrize(("changes", "expected"), [
    ([-.4, -.1, .1, .3], [8, 16, 32, 64]),
    ([.10, .15, .20, .30, .40, .50], [8, 8, 8, 16, 32, 64]),
    ([-.3, -.3], [8, 8]),
    ([-.3, .3], [8, 64]),
])
def test_vectors_of_signed_changes(changes: list[float], expected: list[int]) -> None:
    assert ranks_of(changes, by="signed") == expected


def test_what_is_compared_has_a_known_name() -> None:
    with pytest.raises(ValueError, match="by = 'sum' is unknown"):
        ranks_of([.1], by="sum")  # type: ignore[arg-type]


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


# ---- rules

LAYERS = {"q": [0, 1, 2, 3, 4, 5], "v": [0, 1, 2, 3]}
BEFORE = WindowStats(0, 10, 1.0, {family: dict.fromkeys(layers, 100.0) for family, layers in LAYERS.items()})
AFTER = WindowStats(1, 20, 1.0, {"q": dict(enumerate([99.5, 100.1, 100.2, 100.3, 100.4, 100.5])),
                                 "v": dict(enumerate([99.6, 99.9, 100.1, 100.3]))})


def test_algorithm_2_by_signed_changes_of_two_windows() -> None:
    assert PreloraRanks(8, 64)(LAYERS, [BEFORE, AFTER])["v"] == {0: 64, 1: 8, 2: 8, 3: 32}
    assert PreloraRanks(8, 64, "signed")(LAYERS, [BEFORE, AFTER])["v"] == {0: 8, 1: 16, 2: 32, 3: 64}


def test_independent_random_ranks_are_powers_of_two_from_the_seed() -> None:
    rule = RandomRanks(8, 64)
    assert (rule.windows, rule.highest) == (0, 64)
    draws = [rule({"q": range(24)}, (), seed)["q"] for seed in range(20)]
    assert draws[0] == rule({"v": range(3), "q": list(range(24))[::-1]}, (), 0)["q"], "it depends on nothing else"
    assert {rank for ranks in draws for rank in ranks.values()} == {8, 16, 32, 64}
    assert len({tuple(ranks.values()) for ranks in draws}) == len(draws)
    counts = [sum(rank == power for ranks in draws for rank in ranks.values()) for power in (8, 16, 32, 64)]
    assert all(80 < count < 160 for count in counts), "each of 480 ranks has a probability of 1/4"


@given(st.integers(0, 1000))
def test_permuted_ranks_are_those_of_algorithm_2_in_another_order(seed: int) -> None:
    rule = RandomRanks(8, 64, "permuted")
    assert rule.windows == 2
    expected, found = PreloraRanks(8, 64)(LAYERS, [BEFORE, AFTER]), rule(LAYERS, [BEFORE, AFTER], seed)
    for family, layers in LAYERS.items():
        assert list(found[family]) == layers
        assert sorted(found[family].values()) == sorted(expected[family].values())


def test_permutations_differ_between_seeds() -> None:
    rule = RandomRanks(8, 64, "permuted")
    found = {tuple(rule(LAYERS, [BEFORE, AFTER], seed)["q"].values()) for seed in range(20)}
    assert len(found) > 10


# ---- rules by singular values

def seen(spectra: dict[str, dict[int, Spectrum]], norms: dict[str, dict[int, float]] | None = None,
         index: int = 0) -> WindowStats:
    norms = norms or {family: dict.fromkeys(layers, 1.0) for family, layers in spectra.items()}
    return WindowStats(index, 10 * index, 1.0, norms, spectra=spectra)


def now_and_first(*pairs: tuple[float, float]) -> dict[str, dict[int, Spectrum]]:
    return {"q": {layer: Spectrum(now, first, ()) for layer, (now, first) in enumerate(pairs)}}


def test_ranks_in_proportion_to_the_stable_rank_that_is_left() -> None:
    rule = StableRanks(r_min=8, r_max=64)
    assert (rule.windows, rule.highest, rule.needs) == (1, 64, {"spectra"})
    pairs = ((256.0, 256.0), (128.0, 256.0), (65.0, 256.0), (1.0, 256.0), (300.0, 256.0), (3.0, 0.0))
    assert rule({"q": range(6)}, [seen(now_and_first(*pairs))])["q"] == {0: 64, 1: 32, 2: 17, 3: 8, 4: 64, 5: 64}


@pytest.mark.parametrize("pair", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_a_stable_rank_that_is_not_finite_gives_no_rank(pair: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"q\.01"):
        StableRanks(r_min=8, r_max=64)({"q": [0, 1]}, [seen(now_and_first((2.0, 4.0), pair))])


def changed(*changes: tuple[float, ...]) -> dict[str, dict[int, Spectrum]]:
    return {"q": {layer: Spectrum(2.0, 4.0, change) for layer, change in enumerate(changes)}}


def test_the_smallest_power_of_two_that_holds_the_share() -> None:
    window = seen(changed((.95, .97, .99, .995), (.5, .8999999, .95, .99), (.1, .2, .3, .4), (), (.2, .3, .5, .899)))
    assert EnergyRanks(share=.9, r_min=1, r_max=8)({"q": range(5)}, [window])["q"] == {0: 1, 1: 2, 2: 8, 3: 1, 4: 8}
    assert EnergyRanks(share=.9, r_min=4, r_max=8)({"q": range(5)}, [window])["q"] == {0: 4, 1: 4, 2: 8, 3: 4, 4: 8}
    ranks = EnergyRanks(share=1.0, r_min=1, r_max=16)({"q": range(5)}, [window])["q"]
    assert ranks == {0: 16, 1: 16, 2: 16, 3: 1, 4: 16}
    with pytest.raises(ValueError, match=r"q\.01 since the start of the run is not finite"):
        EnergyRanks(share=.9, r_min=1, r_max=8)({"q": [0, 1]}, [seen(changed((.5,), (math.nan,)))])


@pytest.mark.parametrize("rule", [
    StableRanks(r_min=0, r_max=8, settled=.5), EnergyRanks(share=.9, r_min=0, r_max=8, settled=.5)])
def test_a_layer_that_has_settled_gets_rank_0(rule: StableRanks | EnergyRanks) -> None:
    assert rule.windows == 2 and rule.needs == {"spectra", "norms"}
    spectra = changed((.95,), (.5, .6, .92), (.1,), (.2,))
    windows = [seen(spectra, {"q": {0: 100.0, 1: 100.0, 2: 100.0, 3: 100.0}}),
               seen(spectra, {"q": {0: 100.5, 1: 101.0, 2: 99.4, 3: 99.6}}, 1)]
    ranks = rule({"q": range(4)}, windows)["q"]
    assert [ranks[0], ranks[3]] == [0, 0] and all(ranks[layer] >= 1 for layer in (1, 2))


def test_if_all_layers_have_settled_the_one_that_changed_most_keeps_its_adapter() -> None:
    ranks = {"q": {0: 4, 1: 4}, "v": {0: 2, 5: 8}}
    before = seen({}, {family: dict.fromkeys(layers, 100.0) for family, layers in ranks.items()})
    after = seen({}, {"q": {0: 100.1, 1: 99.8}, "v": {0: 100.3, 5: 99.6}}, 1)
    assert without_settled(ranks, [before, after], 1.0) == {"q": {0: 0, 1: 0}, "v": {0: 0, 5: 8}}
    assert without_settled(ranks, [before, after], .25) == {"q": {0: 0, 1: 0}, "v": {0: 2, 5: 8}}
