from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.core.spectra import Spectrum
from prelora_ds.core.switch_tests.prelora import (
    Observation,
    PreloraTest,
    Verdict,
    WindowStats,
    changes_by_layer,
    close_window,
    partially_converged,
)
from prelora_ds.core.switch_tests.progress import Progress
from prelora_ds.core.switch_tests.stable_rank import StableRankTest


def windows_of(loss: Sequence[float], first_index: int = 1, **norms: Sequence[float]) -> list[WindowStats]:
    """One layer per family; the n-th window has the n-th of each series."""
    return [WindowStats(first_index + n, 10 * n, value, {family: {0: series[n]} for family, series in norms.items()})
            for n, value in enumerate(loss)]


def passed(windows: list[WindowStats], tau: float = 1, zeta: float = 5, aggregate: str = "norm_of_mean") -> bool:
    return partially_converged(windows, k=len(windows), tau=tau, zeta=zeta, aggregate=aggregate).passed


# ---- Algorithm 1: vectors

def test_paper_thresholds() -> None:
    windows = windows_of([3, 2.9, 2.8], q=[100, 100.9, 101.8], v=[50, 50.4, 50.7])
    assert passed(windows, 1, 5)
    assert not passed(windows, .5, 2.5)


def test_a_norm_that_moved_fails() -> None:
    assert not passed(windows_of([3, 2.99, 2.98], q=[100, 98, 97.9]), 1, 5)


def test_a_loss_that_moved_fails_up_or_down() -> None:
    for last in (2.8, 3.2):
        assert not passed(windows_of([3, last], q=[100, 100]), 1, 5)


def test_equality_passes_despite_float_noise() -> None:
    windows = windows_of([4, 3.8, 3.61], q=[100, 101, 102.01])
    verdict = partially_converged(windows, k=3, tau=1, zeta=5)
    assert any(abs(change) > 1 for change in verdict.norm_changes["q"]) or any(
        abs(change) > 5 for change in verdict.loss_changes)  # the noise is there
    assert verdict.passed is True
    assert not passed(windows, 1 - 1e-6, 5)
    assert not passed(windows, 1, 5 - 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("aggregate", ["norm_of_mean", "mean_of_layers"])
@pytest.mark.parametrize("threshold", [1, math.inf])
def test_not_finite_fails(bad: float, where: int, aggregate: str, threshold: float) -> None:
    series = [100.0, 100.0, 100.0]
    series[where] = bad
    for windows in (windows_of([3, 3, 3], q=series), windows_of(series, q=[1, 1, 1])):
        assert not passed(windows, threshold, threshold, aggregate)
    both = [WindowStats(n, n, 3.0, {"q": {0: 1.0, 1: series[n], 2: -series[n]}}) for n in range(3)]
    assert not passed(both, threshold, threshold, aggregate)


@pytest.mark.parametrize("aggregate", ["norm_of_mean", "mean_of_layers"])
def test_zero_passes_only_if_unchanged(aggregate: str) -> None:
    assert passed(windows_of([0, 0], q=[0, 0]), aggregate=aggregate)
    assert not passed(windows_of([1, 1], q=[0, 1e-30]), aggregate=aggregate)
    assert not passed(windows_of([0, 1e-30], q=[1, 1]), aggregate=aggregate)
    assert not passed(windows_of([1, 1], q=[0, math.nan]), aggregate=aggregate)


def test_aggregates() -> None:
    windows = [WindowStats(0, 1, 1.0, {"q": {0: 10.0, 1: 100.0}}), WindowStats(1, 2, 1.0, {"q": {0: 10.5, 1: 100.2}})]
    for aggregate, expected in (("norm_of_mean", .35 / 55 * 100), ("mean_of_layers", 2.6)):
        verdict = partially_converged(windows, k=2, tau=1, zeta=5, aggregate=aggregate)
        assert verdict.norm_changes["q"] == pytest.approx((expected,))
        assert verdict.passed is (expected < 1)
    default = partially_converged(windows, k=2, tau=1, zeta=5)
    assert default.norm_changes["q"] == pytest.approx((.636,), abs=5e-4)


def test_mean_of_layers_does_not_cancel() -> None:
    windows = [WindowStats(0, 1, 1.0, {"q": {0: 50.0, 1: 50.0}}), WindowStats(1, 2, 1.0, {"q": {0: 60.0, 1: 40.0}})]
    assert passed(windows, aggregate="norm_of_mean")
    assert not passed(windows, aggregate="mean_of_layers")


@pytest.mark.parametrize(("statistic", "expected"), [("mean", (1.4925, 1.4706)), ("last", (1.4851, 1.4634))])
def test_window_statistic(statistic: str, expected: tuple[float, float]) -> None:
    seen = [Observation(i + 1, 10, 2.0, {"q": {0: 100 + .5 * i}}) for i in range(9)]
    windows = [close_window(n, seen[3 * n:3 * n + 3], statistic) for n in range(3)]
    assert [window.last_step for window in windows] == [3, 6, 9]
    verdict = partially_converged(windows, k=3, tau=1, zeta=5)
    assert verdict.norm_changes["q"] == pytest.approx(expected, abs=5e-5)


# ---- Algorithm 1: its frame

def test_only_the_last_k_windows_count() -> None:
    windows = windows_of([9, 3, 3, 3], q=[1, 100, 100, 100])
    assert partially_converged(windows, k=3, tau=1, zeta=5).passed
    assert not partially_converged(windows, k=4, tau=1, zeta=5).passed


@pytest.mark.parametrize("have", [0, 1, 2])
def test_missing_windows(have: int) -> None:
    verdict = partially_converged(windows_of([3] * have, q=[100] * have), k=3, tau=1, zeta=5)
    assert verdict == Verdict(False, f"{have} of 3 windows seen, {3 - have} missing", {}, ())


def test_reason_names_the_worst_offender() -> None:
    windows = windows_of([3, 3, 2.8], 2, q=[100, 101.2, 101.2], v=[49, 49, 49.8])
    verdict = partially_converged(windows, k=3, tau=1, zeta=5)
    assert verdict.reason == "v changed by 1.633 % between windows 3 and 4 (tau 1 %)"
    assert set(verdict.norm_changes) == {"q", "v"}
    assert verdict.norm_changes["q"] == pytest.approx((1.2, 0))
    assert verdict.loss_changes == pytest.approx((0, -20 / 3))


def test_reason_weighs_each_offender_by_its_own_threshold() -> None:
    windows = windows_of([4, 3], 7, q=[100, 102])
    assert (partially_converged(windows, k=2, tau=1, zeta=5).reason
            == "loss changed by -25 % between windows 7 and 8 (zeta 5 %)")


def test_reason_puts_nan_first() -> None:
    windows = windows_of([3, 3], 7, q=[100, 900], v=[1, math.nan])
    assert (partially_converged(windows, k=2, tau=1, zeta=5).reason
            == "v changed by nan % between windows 7 and 8 (tau 1 %)")


def test_reason_of_a_pass() -> None:
    windows = windows_of([100, 96.9, 96.9], 2, q=[100, 100, 100.42], v=[100, 99.9, 99.9])
    assert (partially_converged(windows, k=3, tau=1, zeta=5).reason
            == "all |dW| <= 0.42 % (tau 1 %), all |dL| <= 3.1 % (zeta 5 %) over windows 2-4")


@pytest.mark.parametrize(("settings", "message"), [
    ({"k": 1}, "k 1"), ({"tau": 0}, "tau 0"), ({"tau": -1.0}, "tau -1"), ({"tau": math.nan}, "tau nan"),
    ({"zeta": 0}, "zeta 0"), ({"zeta": math.nan}, "zeta nan"), ({"aggregate": "median"}, "aggregate 'median'"),
])
@pytest.mark.parametrize("have", [0, 3])
def test_bad_settings(settings: dict[str, float], message: str, have: int) -> None:
    with pytest.raises(ValueError, match=message):
        partially_converged(windows_of([3] * have, q=[100] * have), **{"k": 3, "tau": 1, "zeta": 5, **settings})


@pytest.mark.parametrize("norms", [{}, {"q": {}}, {"q": {0: 1.0}, "v": {}}])
def test_no_families_or_layers(norms: dict[str, dict[int, float]]) -> None:
    with pytest.raises(ValueError, match="have no families, or a family has no layers"):
        partially_converged([WindowStats(n, n, 1.0, norms) for n in range(2)], k=2, tau=1, zeta=5)


@pytest.mark.parametrize("other", [{"q": {0: 1.0}}, {"q": {0: 1.0, 1: 1.0}, "v": {2: 1.0}}])
def test_families_or_layers_that_differ(other: dict[str, dict[int, float]]) -> None:
    first, second = WindowStats(0, 1, 1.0, {"q": {0: 1.0, 1: 1.0}}), WindowStats(1, 2, 1.0, other)
    name = r"q\.01" if "v" not in other else r"v\.02"
    for call in (lambda: partially_converged([first, second], k=2, tau=1, zeta=5),
                 lambda: partially_converged([second, first], k=3, tau=1, zeta=5),
                 lambda: changes_by_layer(first, second),
                 lambda: close_window(0, [Observation(1, 1, 1.0, w.norms) for w in (first, second)], "last")):
        with pytest.raises(ValueError, match=name):
            call()


# ---- joined families

def test_joined_families_are_one_family_with_all_their_linears() -> None:
    """By the mean of layers, o and fc2 together change by 2 %, although fc2 alone changes by 3 %."""
    first = WindowStats(0, 1, 3.0, {"q": {0: 100.0}, "o": {0: 100.0, 1: 50.0}, "fc2": {0: 10.0, 1: 20.0}})
    last = WindowStats(1, 2, 3.0, {"q": {0: 100.5}, "o": {0: 99.0, 1: 50.5}, "fc2": {0: 10.3, 1: 19.4}})
    settings: dict[str, Any] = {"k": 2, "tau": 2.0, "zeta": 5.0}
    joined = {"output": ("o", "fc2")}
    apart = partially_converged([first, last], aggregate="mean_of_layers", **settings)
    together = partially_converged([first, last], aggregate="mean_of_layers", joined=joined, **settings)
    assert {family: change for family, (change,) in apart.norm_changes.items()} == pytest.approx(
        {"q": .5, "o": 1.0, "fc2": 3.0})
    assert {family: change for family, (change,) in together.norm_changes.items()} == pytest.approx(
        {"q": .5, "output": 2.0})
    assert not apart.passed and together.passed
    mean = partially_converged([first, last], joined=joined, **settings)
    assert mean.norm_changes["output"] == pytest.approx(((179.2 - 180) / 180 * 100,))
    assert PreloraTest(2.0, 5.0, 2, 1, "last", "mean_of_layers", joined=joined)([first, last], Progress(2, 9)).passed


# ---- changes by layer

def test_changes_by_layer() -> None:
    before = WindowStats(0, 1, 1.0, {"q": {0: 10.0, 3: 200.0}, "v": {0: 0.0}})
    after = WindowStats(1, 2, 1.0, {"v": {0: 0.0}, "q": {3: 199.0, 0: 10.5}})
    changes = changes_by_layer(before, after)
    assert changes["v"] == {0: 0.0}
    assert changes["q"] == pytest.approx({0: 5.0, 3: -.5})


@pytest.mark.parametrize(("before", "after"), [(1, math.nan), (math.inf, 1), (1, math.inf), (0, 1)])
def test_changes_by_layer_that_are_not_finite(before: float, after: float) -> None:
    first, second = (WindowStats(n, n, 1.0, {"q": {0: 1.0, 5: norm}}) for n, norm in enumerate((before, after)))
    with pytest.raises(ValueError, match=r"q\.05"):
        changes_by_layer(first, second)


# ---- windows

def test_close_window_weighs_the_loss_by_samples() -> None:
    seen = [Observation(10, 30, 2.0, {"q": {0: 1.0, 1: 5.0}}), Observation(20, 10, 4.0, {"q": {0: 3.0, 1: 6.0}})]
    assert close_window(7, seen, "mean") == WindowStats(7, 20, 2.5, {"q": {0: 2.0, 1: 5.5}})
    assert close_window(7, seen, "last") == WindowStats(7, 20, 2.5, {"q": {0: 3.0, 1: 6.0}})


@pytest.mark.parametrize("statistic", ["mean", "last"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_close_window_keeps_what_is_not_finite(statistic: str, bad: float) -> None:
    seen = [Observation(1, 1, bad, {"q": {0: 1.0}}), Observation(2, 1, 1.0, {"q": {0: bad}})]
    window = close_window(0, seen, statistic)
    assert not math.isfinite(window.loss)
    assert not math.isfinite(window.norms["q"][0])


def test_close_window_errors() -> None:
    seen = Observation(1, 1, 1.0, {"q": {0: 1.0}})
    with pytest.raises(ValueError, match="statistic 'median'"):
        close_window(0, [seen], "median")
    with pytest.raises(ValueError, match="window 4 has no observations"):
        close_window(4, [], "mean")
    with pytest.raises(ValueError, match="without samples"):
        close_window(0, [seen, Observation(2, 0, 1.0, {"q": {0: 1.0}})], "mean")


# ---- properties

NUMBER = st.floats(1e-3, 1e6)


@st.composite
def histories(draw: st.DrawFn) -> list[WindowStats]:
    """2 to 4 windows over one layout, changing by up to a few per cent, so that both verdicts occur."""
    layout = draw(st.dictionaries(st.sampled_from(["q", "k", "v", "o"]), st.sets(st.integers(0, 30), min_size=1,
                  max_size=4), min_size=1))
    start = {family: {layer: draw(NUMBER) for layer in sorted(layout[family])} for family in sorted(layout)}
    drift = st.floats(.97, 1.03)
    return [WindowStats(n, n * 10, 3.0 * draw(drift), {
        family: {layer: norm * draw(drift) for layer, norm in layers.items()} for family, layers in start.items()
    }) for n in range(draw(st.integers(2, 4)))]


THRESHOLD = st.floats(.01, 10)
AGGREGATE = st.sampled_from(["norm_of_mean", "mean_of_layers"])


@given(histories(), THRESHOLD, THRESHOLD, st.floats(1, 10), st.floats(1, 10), AGGREGATE)
def test_loosening_never_turns_pass_into_fail(
    windows: list[WindowStats], tau: float, zeta: float, looser: float, laxer: float, aggregate: str
) -> None:
    tight, loose = passed(windows, tau, zeta, aggregate), passed(windows, tau * looser, zeta * laxer, aggregate)
    assert loose or not tight


@given(histories(), AGGREGATE)
def test_passes_exactly_from_the_largest_change_on(windows: list[WindowStats], aggregate: str) -> None:
    verdict = partially_converged(windows, k=len(windows), tau=100, zeta=100, aggregate=aggregate)
    norm = max(abs(change) for changes in verdict.norm_changes.values() for change in changes)
    loss = max(map(abs, verdict.loss_changes))
    assert passed(windows, norm + 1e-6, loss + 1e-6, aggregate)
    if norm > 1e-4:
        assert not passed(windows, norm * .999, 100, aggregate)
    if loss > 1e-4:
        assert not passed(windows, 100, loss * .999, aggregate)


@given(histories(), THRESHOLD, THRESHOLD, AGGREGATE, st.data())
def test_order_free_and_deterministic(
    windows: list[WindowStats], tau: float, zeta: float, aggregate: str, data: st.DataObject
) -> None:
    shuffled = [WindowStats(w.index, w.last_step, w.loss, {
        family: dict(data.draw(st.permutations(list(w.norms[family].items()))))
        for family in data.draw(st.permutations(list(w.norms)))}) for w in windows]
    expected = partially_converged(windows, k=len(windows), tau=tau, zeta=zeta, aggregate=aggregate)
    for history in (windows, shuffled):
        verdict = partially_converged(history, k=len(windows), tau=tau, zeta=zeta, aggregate=aggregate)
        assert verdict == expected
        assert list(verdict.norm_changes) == list(expected.norm_changes)
    assert changes_by_layer(*shuffled[-2:]) == changes_by_layer(*windows[-2:])


@given(histories(), st.integers(-20, 20))
def test_scale_free(windows: list[WindowStats], exponent: int) -> None:
    scaled = [WindowStats(w.index, w.last_step, w.loss * 2.0**exponent, {
        family: {layer: norm * 2.0**exponent for layer, norm in layers.items()} for family, layers in w.norms.items()})
        for w in windows]
    assert (partially_converged(scaled, k=len(windows), tau=1, zeta=5)
            == partially_converged(windows, k=len(windows), tau=1, zeta=5))


# ---- stable ranks

def with_stable_ranks(**series: list[float]) -> list[WindowStats]:
    """One window per entry; each family has two layers, whose stable ranks have the given mean."""
    count = len(next(iter(series.values())))
    spectra = [{family: {0: Spectrum(values[n] - 1, 50.0, ()), 1: Spectrum(values[n] + 1, 50.0, ())}
                for family, values in series.items()} for n in range(count)]
    return [WindowStats(n, 10 * n, 1.0, {}, spectra=each) for n, each in enumerate(spectra)]


@pytest.mark.parametrize(("q", "v", "reason"), [
    ([90, 20, 20.2, 20.4], [90, 40, 39.7, 39.4], "all stable ranks changed by at most 1 % (tau 1 %) over windows 1-3"),
    ([90, 20, 20.2, 20.5], [90, 40, 40, 40],
     "the stable rank of q changed by 1.485 % between windows 2 and 3 (tau 1 %)"),
    ([90, 20, 20, 20], [90, 40, 39, 39],
     "the stable rank of v changed by -2.5 % between windows 1 and 2 (tau 1 %)"),
    ([90, 20, 20, math.nan], [90, 40, 40, 40], "the stable rank of q changed by nan % between windows 2 and 3"),
    ([90, 0, 0, 0], [90, 40, 40, 40], "all stable ranks changed by at most 0 % (tau 1 %) over windows 1-3"),
])
def test_a_phase_ends_when_its_stable_ranks_have_settled(q: list[float], v: list[float], reason: str) -> None:
    verdict = StableRankTest(1.0)(with_stable_ranks(q=q, v=v), Progress(40, 100))
    assert verdict.reason.startswith(reason) and verdict.passed == reason.startswith("all")
    assert (verdict.miss is None) == verdict.passed


def test_the_windows_of_stable_ranks_are_those_of_their_last_observation() -> None:
    test = StableRankTest(2.5, k=2, m=3)
    seen = [Observation(step, 1, 1.0, {"q": {0: 1.0}}, {"q": {0: Spectrum(float(step), 9.0, ())}})
            for step in (2, 4, 6)]
    assert test.windowing.close(0, seen).spectra == {"q": {0: Spectrum(6.0, 9.0, ())}}
    assert (test.k, test.needs) == (2, {"spectra"})
