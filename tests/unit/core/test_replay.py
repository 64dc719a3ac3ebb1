"""Decisions made again from logged observations, with the thresholds of the run or with others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prelora_ds.core.controller import PhaseController
from prelora_ds.core.duration import Duration
from prelora_ds.core.layout import Layout
from prelora_ds.core.merge import Merge
from prelora_ds.core.phases import Adapters, PhaseSpec
from prelora_ds.core.rank_rules.prelora import PreloraRanks
from prelora_ds.core.rank_rules.uniform import UniformRank
from prelora_ds.core.replay import coarser, compared, replay, suggested, with_tests
from prelora_ds.core.schedule import Timeline
from prelora_ds.core.switch_tests.prelora import Observation, PreloraTest

LAYERS = 3
LAYOUT = Layout({f"{layer}.{family}.weight": (8, 8) for layer in range(LAYERS) for family in "qv"} | {"head": (2, 8)},
                {family: {layer: f"{layer}.{family}" for layer in range(LAYERS)} for family in "qv"},
                {f"{layer}.": layer for layer in range(LAYERS)})
TIMELINE = Timeline(100, 10, Duration("100 steps"))
TEST = PreloraTest(tau=1.0, zeta=5.0, k=2, m=1)
PHASES = (PhaseSpec("full", until=TEST),
          PhaseSpec("warmup", Adapters("lora", ("q", "v"), PreloraRanks(2, 4)), until=Duration("10 steps")),
          PhaseSpec("lora", train=("adapters", "rest")))


def controller(*phases: PhaseSpec) -> PhaseController:
    return PhaseController(layout=LAYOUT, timeline=TIMELINE, phases=phases or PHASES, seed=3)


def observations(every: int = 5) -> list[Observation]:
    """Norms that change by 10 %, 9 %, ... between two observations, the loss by half of that."""
    seen, norm, loss = [], 100.0, 4.0
    for i, step in enumerate(range(every, 101, every)):
        change = max(0.0, 10.0 - i) / 100
        norm, loss = norm * (1 + change), loss * (1 - change / 2)
        norms = {family: {layer: norm + layer for layer in range(LAYERS)} for family in "qv"}
        seen.append(Observation(step, 50, loss, norms))
    return seen


def decided(control: PhaseController, log: list[Observation]) -> list[tuple[int, str]]:
    return [(each.step, each.state.plan.phase) for each in replay(control, log).decisions]


def test_a_replay_decides_as_the_controller_does() -> None:
    control, state = controller(), controller().initial()
    steps = []
    for seen in observations():
        before, state = state, control.next(state, seen)
        if state.plan != before.plan:
            steps.append((seen.step, state.plan.phase, state.reason))
    found = replay(control, observations()).decisions
    assert [(each.step, each.state.plan.phase, each.state.reason) for each in found] == steps
    assert [phase for _, phase, _ in steps] == ["warmup", "lora"]


def test_looser_thresholds_switch_earlier_and_tighter_ones_never() -> None:
    first = [decided(controller(*with_tests(PHASES, lambda test, tau=tau: replace(test, tau=tau))), observations())
             for tau in (1.0, 4.0, 8.0)]
    assert first[0][0][0] > first[1][0][0] > first[2][0][0]
    tight = controller(*with_tests(PHASES, lambda test: replace(test, tau=1e-9)))
    log = observations()[:9]  # the norms still change by 2 %
    found = replay(tight, log)
    assert found.decisions == () and found.closest is not None
    assert (found.closest.what, found.closest.step) == ("q", 45) and found.closest.change == pytest.approx(2, rel=0.02)


def test_the_closest_test_names_the_change_that_is_too_large() -> None:
    loss = controller(*with_tests(PHASES, lambda test: replace(test, tau=50.0, zeta=1e-3)))
    closest = replay(loss, observations()[:8]).closest
    assert closest is not None and closest.what == "loss" and closest.threshold == 1e-3


def test_what_follows_a_decision_that_the_run_did_not_make_is_extrapolated() -> None:
    own = replay(controller(), observations()).decisions
    assert not any(each.extrapolated for each in compared(own, own))
    other = replay(controller(*with_tests(PHASES, lambda test: replace(test, tau=8.0))), observations()).decisions
    assert [each.extrapolated for each in compared(other, own)] == [False, True]
    never = compared(own, ())
    assert [each.extrapolated for each in never] == [False, True], "a baseline decided nothing"
    late = replay(controller(*with_tests(PHASES, lambda test: replace(test, tau=1e-9))), observations()).decisions
    assert all(each.extrapolated for each in compared(late, own)), "the run had switched before"


def test_fewer_observations_are_those_of_a_run_that_makes_fewer() -> None:
    joined = list(coarser(observations(), frozenset({10, 20, 30})))
    assert [(each.step, each.samples) for each in joined] == [(10, 100), (20, 100), (30, 100)]
    log = observations()
    assert joined[0].loss == pytest.approx((log[0].loss + log[1].loss) / 2) and joined[0].norms == log[1].norms


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("step", [20, 35, 50])
def test_suggested_thresholds_pass_at_the_step_that_is_said(step: int, strict: bool) -> None:
    phases = with_tests(PHASES, lambda test: replace(test, strict=strict))
    found = suggested(controller(*phases), observations(), step)
    assert found is not None and found.step == step
    tried = controller(*with_tests(phases, lambda test: replace(test, tau=found.tau, zeta=found.zeta)))
    assert decided(tried, observations())[0] == (step, "warmup")


def test_nothing_is_suggested_where_no_test_was_made() -> None:
    assert suggested(controller(), observations()[:1], 50) is None


def test_merges_between_observations_are_followed() -> None:
    phases = (PhaseSpec("full", until=Duration("10 steps")),
              PhaseSpec("relora", Adapters("lora", ("q",), UniformRank(2)), ("adapters",),
                        until=Duration("30 steps"), merge=Merge(Duration("7 steps"))),
              PhaseSpec("last", train=("adapters",)))
    found = replay(controller(*phases), observations()).decisions
    assert [(each.step, each.state.plan.cycle) for each in found] == [(10, 0), (40, 4)]
