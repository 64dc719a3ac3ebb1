"""The state of a run in a checkpoint, in its logs and on other ranks is read back bitwise."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import prelora_plans
from support.values import FINITE, NORMS, same

from prelora_ds.config.training import TrainConfig
from prelora_ds.core.codec import from_json, to_json
from prelora_ds.core.controller import PhaseState
from prelora_ds.core.divergence import DivergenceWatch
from prelora_ds.core.layout import Layout
from prelora_ds.core.switch_tests.prelora import Observation, WindowStats
from prelora_ds.cost.bytes import Bytes
from prelora_ds.engine.engine import Counters, StepStats
from prelora_ds.engine.transition import Switch
from prelora_ds.run.checkpoints.checkpoint_folder import CheckpointManifest
from prelora_ds.run.evaluate import Accuracy, Result
from prelora_ds.run.log import Meter
from prelora_ds.run.run_state import RunState

LAYOUT = Layout({"a.weight": (8, 4), "a.bias": (8,)}, {"q": {0: "a"}})
PLANS = prelora_plans(LAYOUT, 2)

WINDOWS = st.lists(st.builds(WindowStats, norms=NORMS), max_size=2).map(tuple)
OPEN = st.lists(st.builds(Observation, norms=NORMS), max_size=2).map(tuple)
METERS = st.builds(Meter)
STATES = st.builds(
    RunState, phase=st.builds(PhaseState, plan=st.sampled_from(PLANS), windows=WINDOWS, open=OPEN),
    watch=st.builds(DivergenceWatch), window=METERS, logged=METERS, accuracy=st.none() | st.builds(Accuracy),
    best_acc1=st.none() | FINITE)
MANIFESTS = st.builds(CheckpointManifest, acc1=st.none() | FINITE)


@given(STATES | MANIFESTS | METERS | st.builds(Result) | st.builds(Counters) | st.builds(Bytes) | st.builds(Switch))
def test_a_value_is_read_back_bitwise(value: Any) -> None:
    text = json.dumps(to_json(value), allow_nan=False)
    assert same(from_json(type(value), json.loads(text)), value)


def test_a_state_of_version_0_1_0_may_lack_later_fields() -> None:
    state = RunState(3, PhaseState(PLANS[0]), DivergenceWatch(), accuracy=Accuracy(1, 2, 0.5))
    data = to_json(state)
    del data["evaluated_at"], data["best_acc1"]
    assert from_json(RunState, data) == state


@pytest.mark.parametrize(("path", "value"), [
    ("step", "3"), ("window.losses", None), ("accuracy.correct", 0.5), ("corrupt", [1]), ("watch.avoided", [1.5]),
    ("phase.plan.trainable", None)])
def test_an_invalid_state_is_refused(path: str, value: Any) -> None:
    data = to_json(RunState(3, PhaseState(PLANS[0]), DivergenceWatch(), accuracy=Accuracy(1, 2, 0.5)))
    *above, last = path.split(".")
    place = data
    for key in above:
        place = place[key]
    if path == "phase.plan.trainable":
        del place[last]
    else:
        place[last] = value
    with pytest.raises(ValueError, match=above[0] if above else last):
        from_json(RunState, data)


def test_a_step_is_counted_in_both_meters_and_a_skipped_one_in_none() -> None:
    state, config = RunState(3, PhaseState(PLANS[0]), DivergenceWatch()), TrainConfig(
        duration="9 steps", global_batch_size=8, micro_batch_size=8)
    assert state.count(StepStats(2.0, 1.0, skipped=False, corrupt=1, step_s=0.5), config, data_s=0.25) == {}
    assert state.window == state.logged == Meter([16.0], 8, 1, 0.5, 0.25, 1)
    left_out = state.count(StepStats(9.0, 1.0, skipped=True), config, data_s=0.25)
    assert left_out == {"left_out": 1, "left_out_loss": 9.0}
    assert state.window.steps == 1 and state.watch.in_a_row == 1


def test_a_meter_that_was_reset_equals_a_new_one() -> None:
    meter = Meter()
    meter.add(2.0, 8, step_s=1.0, data_s=0.5, corrupt=1)
    assert meter == Meter([16.0], 8, 1, 1.0, 0.5, 1)
    meter.reset()
    assert meter == Meter()


def test_a_new_run_keeps_the_closed_windows_of_another_run_but_nothing_that_is_open() -> None:
    seen = Observation(14, 8, 2.0, {"q": {0: 1.0}})
    phase = PhaseState(PLANS[1], 1, (WindowStats(3, 12, 1.0, {"q": {0: 1.0}}),), (seen,), first_window=5)
    state = RunState(15, phase, DivergenceWatch((1.0,), 2, 1, 1, frozenset({9})), corrupt=(1, 2), best_acc1=0.5)
    state.window.add(2.0, 8, step_s=1.0, data_s=0.0)
    state.forget_measurements()
    assert (state.watch, state.window, state.logged) == (DivergenceWatch(), Meter(), Meter())
    assert (state.corrupt, state.best_acc1, state.phase.open) == ((0, 0), None, ())
    assert state.phase.windows == phase.windows
    assert state.phase.first_window == 4  # the next window is entirely in this phase
    anew = state.phase.without_windows()
    assert (anew.windows, anew.open, anew.first_window, anew.next_window) == ((), (), 0, 0)
