"""The tests that end a phase besides Algorithm 1, its further options, and several tests of one phase."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_ind

from prelora_ds.core.codec import to_json
from prelora_ds.core.controller import PhaseController, PhaseState
from prelora_ds.core.duration import Duration
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import Adapters, PhaseSpec
from prelora_ds.core.plan import Plan
from prelora_ds.core.rank_rules.prelora import PreloraRanks
from prelora_ds.core.rank_rules.uniform import UniformRank
from prelora_ds.core.schedule import Timeline
from prelora_ds.core.switch_tests import SwitchTest
from prelora_ds.core.switch_tests.budget import BudgetTest
from prelora_ds.core.switch_tests.combined import AllOf, AnyOf, single_tests, with_single_tests
from prelora_ds.core.switch_tests.fixed import FixedTest
from prelora_ds.core.switch_tests.prelora import (
    Observation,
    PreloraTest,
    Windowing,
    WindowStats,
    close_window,
    partially_converged,
)
from prelora_ds.core.switch_tests.progress import Progress, part_of
from prelora_ds.core.switch_tests.t_test import LossTTest, fall_p_value

LAYERS = 2
LAYOUT = Layout({f"{layer}.q.weight": (8, 8) for layer in range(LAYERS)} | {"head": (2, 8)},
                {"q": {layer: f"{layer}.q" for layer in range(LAYERS)}})
TIMELINE = Timeline(100, 10, Duration("200 steps"))
SOMEWHERE = Progress(50, 200)
LORA = PhaseSpec("lora", Adapters("lora", ("q",), UniformRank(2)), ("adapters",))


def observe(step: int, norm: float = 1.0, loss: float = 1.0) -> Observation:
    return Observation(step, 50, loss, {"q": {layer: norm + layer for layer in range(LAYERS)}})


def controller(*phases: PhaseSpec, step_flops: Callable[[Plan], int] | None = None) -> PhaseController:
    return PhaseController(layout=LAYOUT, timeline=TIMELINE, phases=phases, seed=0, step_flops=step_flops)


def ended(test: SwitchTest, log: Sequence[Observation], **more: Any) -> tuple[int, str] | None:
    """The step after which ``test`` ended the first phase, and why."""
    states = walk(controller(PhaseSpec("full", until=test), LORA, **more), log)
    return next(((seen.step, state.reason) for seen, state in zip(log, states, strict=True) if state.index), None)


def walk(control: PhaseController, log: Sequence[Observation]) -> list[PhaseState]:
    """The state after each observation; between two of them it is stored and read, as in a run that is resumed."""
    states = [control.initial()]
    for seen in log:
        states.append(PhaseState.from_json(json.loads(json.dumps(to_json(control.next(states[-1], seen))))))
    return states[1:]


def windows(*losses: Sequence[float]) -> list[WindowStats]:
    return [WindowStats(n, 10 * n, sum(each) / len(each), {"q": {0: 1.0}}, tuple(each))
            for n, each in enumerate(losses)]


# ---- Algorithm 1: strict, and windows that slide

def test_with_strict_a_norm_must_change_by_less_than_tau() -> None:
    pair = [WindowStats(0, 1, 4.0, {"q": {0: 100.0}}), WindowStats(1, 2, 3.8, {"q": {0: 101.0}})]
    assert partially_converged(pair, k=2, tau=1, zeta=5).passed
    failed = partially_converged(pair, k=2, tau=1, zeta=5, strict=True)
    assert not failed.passed and failed.miss is not None and failed.miss.what == "q"
    passed = partially_converged(pair, k=2, tau=1.0001, zeta=5, strict=True)
    assert passed.passed and passed.miss is None, "the loss may change by exactly zeta"


@given(st.lists(st.floats(1, 1.05), min_size=1, max_size=40), st.integers(1, 4), st.integers(2, 4), st.booleans())
def test_sliding_windows_are_those_of_the_last_m_observations(growth: list[float], m: int, k: int, last: bool) -> None:
    """The oracle cuts all windows out of the whole log."""
    log = [observe(5 * n, 100 * math.prod(growth[:n])) for n in range(1, len(growth) + 1)]
    test = PreloraTest(2.0, 5.0, k, m, "last" if last else "mean", windows="sliding")
    cut = [close_window(n, log[n:n + m], test.statistic) for n in range(len(log) - m + 1)]
    passing = [log[n + m - 1].step for n in range(k - 1, len(cut))
               if partially_converged(cut[n - k + 1:n + 1], k=k, tau=2.0, zeta=5.0).passed]
    found = ended(test, log)
    assert (found and found[0]) == (passing[0] if passing else None)


@pytest.mark.parametrize("first", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_a_sliding_test_sees_only_observations_of_its_own_phase(first: int, m: int) -> None:
    """Norms are constant in the second phase, and different before: with k = 2 it passes after m + 1 observations."""
    phases = (PhaseSpec("a", until=Duration(f"{5 * first} steps")),
              PhaseSpec("b", until=PreloraTest(0.1, 5.0, 2, m, windows="sliding")), PhaseSpec("c"))
    log = [observe(5 * n, 100.0 if n > first else 100.0 + n) for n in range(1, 40)]
    states = walk(controller(*phases), log)
    assert [sum(state.plan.phase == name for state in states) for name in "ab"] == [first - 1, m + 1]


def test_windows_of_another_kind_continue_a_window_that_slid() -> None:
    phases = (PhaseSpec("a", until=PreloraTest(1.0, 5.0, 2, 3, windows="sliding")),
              PhaseSpec("b", until=PreloraTest(1.0, 5.0, 2, 2)), PhaseSpec("c"))
    states = walk(controller(*phases), [observe(5 * n) for n in range(1, 12)])
    assert [state.plan.phase for state in states] == ["a"] * 3 + ["b"] * 5 + ["c"] * 3
    assert [len(window.losses) for window in states[8].windows] == [3, 3, 3, 2, 2]


# ---- t_test

numbers = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))


@given(st.lists(numbers, min_size=2, max_size=30), st.lists(numbers, min_size=2, max_size=30))
def test_the_p_value_is_that_of_scipy(before: list[float], after: list[float]) -> None:
    ours = fall_p_value(before, after)
    if len(set(before)) == len(set(after)) == 1:  # scipy returns NaN, or warns
        assert ours == (0.0 if after[0] < before[0] else 1.0)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of values that differ in their last digits only
        expected = ttest_ind(before, after, equal_var=False, alternative="greater").pvalue
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_p_value_keeps_its_digits_in_both_tails() -> None:
    rng = random.Random(1)
    for _ in range(300):
        spread, shift = 10 ** rng.uniform(-6, 3), rng.uniform(-9, 9)
        before = [rng.gauss(shift * spread, spread) for _ in range(rng.randint(2, 40))]
        after = [rng.gauss(0, spread * 10 ** rng.uniform(-2, 2)) for _ in range(rng.randint(2, 40))]
        expected = ttest_ind(before, after, equal_var=False, alternative="greater").pvalue
        assert fall_p_value(before, after) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_losses_that_are_not_finite_do_not_pass(bad: float) -> None:
    verdict = LossTTest(m=2)(windows([1.0, 1.1], [1.0, bad]), SOMEWHERE)
    assert not verdict.passed and verdict.miss is not None and verdict.miss.excess == math.inf


def test_a_fall_of_the_loss_must_be_significant() -> None:
    steady, fallen = [1.0, 1.1, 0.9], [0.5, 0.6, 0.4]
    test = LossTTest(alpha=0.05, k=2, m=3)
    assert test(windows(steady, steady), SOMEWHERE).passed and test(windows(fallen, steady), SOMEWHERE).passed
    failed = test(windows(steady, fallen), SOMEWHERE)
    assert not failed.passed and failed.reason.startswith("p 0.00") and "windows 0 and 1 (alpha 0.05)" in failed.reason
    p = fall_p_value(steady, fallen)
    assert LossTTest(alpha=p * 0.99, m=3)(windows(steady, fallen), SOMEWHERE).passed
    assert not LossTTest(alpha=p, m=3)(windows(steady, fallen), SOMEWHERE).passed, "p = alpha is significant"
    assert failed.miss is not None and failed.miss.value == 1 - p


def test_all_k_windows_are_compared_with_the_one_before() -> None:
    steady, fallen = [1.0, 1.1, 0.9], [0.5, 0.6, 0.4]
    assert not LossTTest(k=3, m=3)(windows(steady, fallen, fallen), SOMEWHERE).passed
    assert LossTTest(k=3, m=3)(windows(steady, fallen, fallen, fallen), SOMEWHERE).passed


def test_windows_of_an_earlier_version_have_no_losses_to_compare() -> None:
    verdict = LossTTest(m=2)([WindowStats(4, 1, 1.0, {}), *windows([1.0, 1.0])], SOMEWHERE)
    assert not verdict.passed and "window 4" in verdict.reason


def test_a_window_has_the_loss_of_each_observation_and_keeps_it_in_a_state() -> None:
    log = [observe(5 * n, loss=1 / n) for n in range(1, 8)]
    state = walk(controller(PhaseSpec("full", until=LossTTest(m=3)), LORA), log)[-1]
    assert [window.losses for window in state.windows] == [(1 / 1, 1 / 2, 1 / 3), (1 / 4, 1 / 5, 1 / 6)]


def test_the_controller_hands_the_losses_on() -> None:
    log = [observe(5 * n, loss=max(1.0, 5.0 - n) + 0.01 * (n % 3)) for n in range(1, 30)]
    found = ended(LossTTest(m=3), log)
    assert found is not None and found[0] == 45 and found[1].startswith("the t-test passed at test 2: p 0.")


@pytest.mark.parametrize("parameters", [{"k": 1}, {"m": 1}, {"alpha": 0.0}, {"alpha": 1.0}, {"alpha": math.nan}])
def test_parameters_without_a_meaning_are_errors(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        LossTTest(**parameters)


# ---- fixed, budget

def test_a_share_counts_as_it_is_written() -> None:
    assert [part_of(share, 100) for share in (0.07, 0.29, 0.571, 1.0)] == [7, 29, 58, 100]
    assert 0.07 * 100 > 7


def test_a_fixed_share_ends_the_phase_at_the_first_observation_from_there_on() -> None:
    log = [observe(step) for step in range(7, 200, 7)]
    assert ended(FixedTest(0.4), log) == (84, "the fixed test passed: 40 % of the run is step 80 of 200")
    assert ended(FixedTest(0.4), log[:11]) is None


def test_a_fixed_share_is_counted_from_the_start_of_the_run() -> None:
    phases = (PhaseSpec("a", until=Duration("60 steps")), PhaseSpec("b", until=FixedTest(0.4)), PhaseSpec("c"))
    states = walk(controller(*phases), [observe(step) for step in range(5, 100, 5)])
    assert [state.plan.since_step for state in states][-1] == 80


def test_ranks_may_depend_on_the_windows_that_a_fixed_test_makes() -> None:
    lora = PhaseSpec("lora", Adapters("lora", ("q",), PreloraRanks(1, 2)), ("adapters",))
    log = [observe(5 * n, 100.0 + n) for n in range(1, 40)]
    states = walk(controller(PhaseSpec("full", until=FixedTest(0.1, m=3)), lora), log)
    assert [state.index for state in states][:6] == [0, 0, 0, 0, 0, 1], "at step 20, but two windows close at 30"
    assert states[4].reason.endswith("waits until 2 windows have closed, because its ranks depend on them")
    assert states[5].windows == tuple(Windowing(3).close(n, log[3 * n:3 * n + 3]) for n in range(2))


COSTS = {"full": 100, "lora": 30, "last": 70}


def cost(plan: Plan) -> int:
    return COSTS[plan.phase]


@pytest.mark.parametrize("budget", [BudgetTest(share=0.5), BudgetTest(flops=10_000.0)])
def test_a_budget_counts_all_steps_of_all_phases(budget: BudgetTest) -> None:
    """Full training costs 200 x 100 FLOPs. 40 steps cost 4,000, then each step 30, so 10,000 are spent at step 240."""
    timeline = Timeline(100, 10, Duration("400 steps"))
    phases = (PhaseSpec("full", until=Duration("40 steps")), PhaseSpec("lora", LORA.adapters, ("adapters",), budget),
              PhaseSpec("last", train=("adapters",)))
    control = PhaseController(layout=LAYOUT, timeline=timeline, phases=phases, seed=0, step_flops=cost)
    log = [observe(step) for step in range(5, 400, 5)]
    spent = {seen.step: sum(100 if step <= 40 else 30 for step in range(1, seen.step + 1)) for seen in log}
    limit = 20_000 if budget.share else 10_000
    expected = next((step for step, flops in spent.items() if flops >= limit), None)
    states = walk(control, log)
    last = [state for state in states if state.plan.phase == "last"]
    assert [state.plan.since_step for state in last[:1]] == ([] if expected is None else [expected])
    if expected is not None:
        assert last[0].flops == spent[expected] and f"FLOPs spent after step {expected}" in last[0].reason


def test_ranks_that_are_chosen_again_have_another_cost() -> None:
    """At first the upper layer moves, from the tenth observation on the lower one: the ranks are 1, 4 and then 4, 1."""
    def by_rank(plan: Plan) -> int:
        return sum((layer + 1) * (plan.adapters[f"{layer}.q"].rank or 0) for layer in range(LAYERS)) \
            if plan.adapters else 10

    ranks = PreloraRanks(1, 4)
    phases = (PhaseSpec("full", until=PreloraTest(90.0, 90.0, 2, 1)),
              PhaseSpec("lora", Adapters("lora", ("q",), ranks, rechosen=Duration("10 steps")), ("adapters",),
                        BudgetTest(flops=900.0)), PhaseSpec("last", train=("adapters",)))
    log = [Observation(5 * n, 50, 1.0, {"q": {0: 100.0 + max(0, n - 10), 1: 100.0 + min(n, 10)}}) for n in range(1, 40)]
    control = controller(*phases, step_flops=by_rank)
    states = [control.initial(), *walk(control, log)]
    spent = 0
    for before, after in pairwise(states):
        spent += 5 * by_rank(before.plan)
        if after.plan.phase == "last":
            break
    assert {by_rank(state.plan) for state in states if state.plan.phase == "lora"} == {9, 6}
    assert after.flops == spent >= 900 > spent - 5 * by_rank(before.plan)


def test_a_budget_is_a_share_or_a_number() -> None:
    for wrong in ({}, {"share": 0.5, "flops": 1.0}):
        with pytest.raises(ValueError):
            BudgetTest(**wrong)


def test_the_state_of_an_earlier_version_is_read() -> None:
    data = to_json(walk(controller(PhaseSpec("full", until=PreloraTest(1e-9, 1.0, 9, 2)), LORA),
                        [observe(5 * n) for n in range(1, 6)])[-1])
    for window in data["windows"]:
        del window["losses"]
    del data["flops"]
    state = PhaseState.from_json(data)
    assert state.flops == 0 and [window.losses for window in state.windows] == [(), ()]


# ---- several tests

SETTLES = PreloraTest(1.0, 5.0, 2, 2)  # with constant norms it passes after 4 observations


def test_any_passes_with_the_first_of_its_tests() -> None:
    log = [observe(5 * n) for n in range(1, 40)]
    early, late = FixedTest(0.05), FixedTest(0.5)
    assert ended(AnyOf((SETTLES, early)), log) == (
        10, "one of 2 tests passed at test 1: the fixed test: 5 % of the run is step 10 of 200")
    found = ended(AnyOf((late, SETTLES)), log)
    assert found is not None and found[0] == 20 and "Algorithm 1: all |dW|" in found[1]
    moving = [observe(5 * n, 100.0 * n) for n in range(1, 40)]
    assert ended(AnyOf((late, SETTLES)), moving) == (
        100, "one of 2 tests passed at test 10: the fixed test: 50 % of the run is step 100 of 200")
    odd = FixedTest(0.475)  # between two windows, at an observation that closes none
    assert ended(AnyOf((odd, SETTLES)), moving) == (
        95, "one of 2 tests passed: the fixed test: 47.5 % of the run is step 95 of 200")


def test_all_pass_at_one_observation() -> None:
    log = [observe(5 * n) for n in range(1, 40)]
    found = ended(AllOf((FixedTest(0.475), SETTLES)), log)
    assert found is not None and found[0] == 100, "at the first window from step 95 on"
    assert found[1].count(";") >= 1 and "the fixed test" in found[1] and "Algorithm 1" in found[1]
    assert ended(AllOf((FixedTest(0.1), FixedTest(0.3))), log) == (
        60, "all 2 tests passed: the fixed test: 10 % of the run is step 20 of 200; "
            "the fixed test: 30 % of the run is step 60 of 200")


@given(st.lists(st.floats(0.5, 1.5), min_size=1, max_size=40), st.floats(0.01, 0.9), st.integers(1, 3))
def test_any_and_all_are_the_earlier_and_the_later_of_their_tests(losses: list[float], at: float, m: int) -> None:
    """A test that has passed once by steps passes from then on, so that `all` waits for the other."""
    log = [observe(5 * n, loss=loss) for n, loss in enumerate(losses, start=1)]
    single, fixed = PreloraTest(5.0, 20.0, 2, m), FixedTest(at)
    steps = [math.inf if (found := ended(test, log)) is None else found[0] for test in (single, fixed)]
    either = ended(AnyOf((single, fixed)), log)
    assert (math.inf if either is None else either[0]) == min(steps)
    both = ended(AllOf((single, fixed)), log)
    assert both is None or both[0] >= max(steps)


def test_what_came_closest_is_the_nearest_of_any_and_the_farthest_of_all() -> None:
    pair = [WindowStats(n, n, 1.0, {"q": {0: norm}}) for n, norm in enumerate((100.0, 102.0))]
    near, far = PreloraTest(1.0, 90.0, 2, 2), PreloraTest(0.1, 90.0, 2, 2)
    for combined, limit in ((AnyOf((near, far)), 1.0), (AllOf((near, far)), 0.1)):
        miss = combined(pair, SOMEWHERE).miss
        assert miss is not None and (miss.what, miss.limit) == ("q", limit)


def test_tests_of_one_phase_share_its_windows() -> None:
    with pytest.raises(ValueError, match="make different ones"):
        AnyOf((SETTLES, LossTTest(m=3)))
    both = AnyOf((SETTLES, LossTTest(m=2), FixedTest(0.5)))
    assert both.windowing == Windowing(2) and both.k == 0 and AllOf(both.tests).k == 2
    assert both.needs == {"norms", "loss"} and AnyOf((FixedTest(0.1), BudgetTest(0.1))).windowing is None
    assert single_tests(both) == both.tests and single_tests(SETTLES) == (SETTLES,)
    changed = with_single_tests(both, lambda test: FixedTest(0.5) if test.k else test)
    assert changed == AnyOf((FixedTest(0.5), FixedTest(0.5), FixedTest(0.5)))
    assert with_single_tests(SETTLES, lambda test: FixedTest(0.1)) == FixedTest(0.1)


def test_as_many_windows_are_kept_as_the_most_demanding_test_compares() -> None:
    test = AnyOf((PreloraTest(1e-12, 1e-12, 40, 1), PreloraTest(1e-12, 1e-12, 2, 1)))
    log = [observe(2 * n, loss=1.0 + n) for n in range(1, 60)]
    assert len(walk(controller(PhaseSpec("full", until=test), LORA), log)[-1].windows) == 40
