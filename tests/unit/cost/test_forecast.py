"""The steps of each phase, and whether a method can be finished, before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.claims import config

from prelora_ds.core.controller import PhaseController, PhaseState
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import PhaseSpec
from prelora_ds.core.schedule import Timeline
from prelora_ds.core.switch_tests.prelora import Observation
from prelora_ds.cost.forecast import merges_of_phases, steps_of_phases, why_unfinished

FAMILIES = ("q", "k", "v", "o", "fc1", "fc2")
LAYOUT = Layout(
    {f"{family}.weight": (8, 8) for family in FAMILIES},
    {family: {0: family} for family in FAMILIES},
)
BY_RULE = "{name: l, adapters: {ranks: {rule: prelora}}, until: "
TEST = "{test: prelora, tau: 1.0, zeta: 5.0, k: 2, m: 3}}"
LAST = "{name: last}"


def run(*phases: str, steps: int = 10) -> Any:
    """The config, layout and timeline of a run that observes every 2 steps."""
    settings = config(
        Path("o"), "convergence=null", "lora=null", "observe.every=2 steps",
        f"train.duration={steps} steps", f"phases=[{', '.join(phases)}]",
    )
    timeline = Timeline(640, settings.train.global_batch_size, settings.train.duration)
    return settings, LAYOUT, timeline


def begun(*phases: str, steps: int = 10) -> tuple[Any, PhaseState]:
    settings, layout, timeline = run(*phases, steps=steps)
    specs: tuple[PhaseSpec, ...] = settings.specs()
    controller = PhaseController(layout=layout, timeline=timeline, phases=specs, seed=0)
    return (settings, layout, timeline), controller.initial()


def test_a_phase_whose_ranks_depend_on_windows_is_foreseen_to_wait_for_them() -> None:
    method = run("{name: full, until: 2 steps}", BY_RULE + TEST, LAST, steps=20)
    assert steps_of_phases(*method, passes=False) == {"full": 12, "l": 8}


@pytest.mark.parametrize(("until", "earliest", "never"), [
    ("{test: fixed, at: 0.25}", 6, 6),
    ("{any: [" + TEST[:-1] + ", {test: fixed, at: 0.8}]}", 12, 16),
    ("{any: [" + TEST[:-1] + ", {test: fixed, at: 0.25}]}", 6, 6),
    ("{all: [" + TEST[:-1] + ", {test: fixed, at: 0.25}]}", 12, 20),
    ("{all: [{test: fixed, at: 0.5}, {test: fixed, at: 0.25}]}", 10, 10),
])
def test_only_a_test_that_looks_at_windows_has_an_uncertain_end(until: str, earliest: int, never: int) -> None:
    method = run(f"{{name: full, until: {until}}}", LAST, steps=20)
    assert steps_of_phases(*method, passes=True)["full"] == earliest
    assert steps_of_phases(*method, passes=False)["full"] == never


@pytest.mark.parametrize("every", ["1 step", "3 steps", "4 steps", "0.3 epochs", "10 %", "100 steps"])
@pytest.mark.parametrize("until", ["8 steps", "100 steps"])
def test_merges_are_foreseen_as_the_controller_makes_them(every: str, until: str) -> None:
    relora = f"{{name: relora, adapters: {{rank: 2}}, train: adapters, until: {until}, merge: {{every: {every}}}}}"
    method, state = begun("{name: full, until: 2 steps}", relora, LAST, steps=20)
    settings, layout, timeline = method
    controller = PhaseController(layout=layout, timeline=timeline, phases=settings.specs(), seed=0)
    merges = 0
    for step in range(1, 21):
        if step % 2 == 0 and step < 20:
            state = controller.next(state, Observation(step, 1, 1.0, {}))
        after = controller.after_step(state, step)
        merges += after.plan.cycle > state.plan.cycle
        state = after
    steps = steps_of_phases(*method, passes=False)
    assert merges_of_phases(settings, timeline, steps) == {"relora": merges}


@pytest.mark.parametrize(("phases", "said"), [
    (("{name: full, until: 100 epochs}", LAST), "before last can begin: phase full lasts until the first observation"),
    (("{name: full, until: 9 steps}", LAST), "phase full lasts until the first observation from step 9 on"),
    (("{name: full, until: " + TEST, LAST),
     "the test of phase full needs 2 windows of 3 observations (observe.every = 2 steps)"),
    (("{name: full, until: {test: fixed, at: 0.85}}", LAST),
     "the fixed test, which ends phase full, does not pass at an observation before the last step"),
    (("{name: full, until: {any: [" + TEST[:-1] + ", {test: fixed, at: 0.85}]}}", LAST),
     "one of 2 tests, which ends phase full, does not pass"),
    (("{name: full, until: 2 steps}", BY_RULE + TEST, LAST),
     "before l, last can begin: phase full has lasted 2 steps; phase l waits until 2 windows have closed")])
def test_a_method_that_cannot_be_finished_is_recognized(phases: tuple[str, ...], said: str) -> None:
    method, state = begun(*phases)
    problem = why_unfinished(*method, state, 0)
    assert problem is not None and said in problem
    assert problem.startswith("the run ends after step 10, before ")


@pytest.mark.parametrize("phases", [
    (LAST,), ("{name: full, until: 8 steps}", LAST), ("{name: full, until: 0 steps}", LAST)])
def test_a_method_that_can_be_finished_gives_no_warning(phases: tuple[str, ...]) -> None:
    method, state = begun(*phases)
    assert why_unfinished(*method, state, 0) is None


def test_a_resumed_run_counts_what_it_has_measured() -> None:
    method, state = begun("{name: full, until: " + TEST, LAST, steps=14)
    settings, layout, timeline = method
    controller = PhaseController(layout=layout, timeline=timeline, phases=settings.specs(), seed=0)
    assert why_unfinished(*method, state, 4) is not None  # as if nothing had been measured
    for step in (2, 4):
        norms = {family: {0: float(step)} for family in FAMILIES}
        state = controller.next(state, Observation(step, 1, 1.0, norms))
    assert why_unfinished(*method, state, 4) is None
