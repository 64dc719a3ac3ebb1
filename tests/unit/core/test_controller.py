"""The controller, driven with synthetic measurements at the ends of epochs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import lora_plan

from prelora_ds.config.phases import PresetConfig
from prelora_ds.config.preset import ConvergenceConfig, LoraConfig, expanded
from prelora_ds.core.codec import to_json
from prelora_ds.core.controller import KEPT_WINDOWS, PhaseController, PhaseState
from prelora_ds.core.duration import Duration
from prelora_ds.core.layout import Layout
from prelora_ds.core.merge import Merge, Reset
from prelora_ds.core.phases import Adapters, PhaseSpec, plan_of
from prelora_ds.core.rank_rules.prelora import PreloraRanks
from prelora_ds.core.rank_rules.uniform import UniformRank
from prelora_ds.core.schedule import Restart, Timeline
from prelora_ds.core.selection import Selection, active_adapters
from prelora_ds.core.switch_tests.prelora import Observation, PreloraTest, partially_converged

LAYERS = 4
LAYOUT = Layout(
    {name: shape for layer in range(LAYERS) for name, shape in (
        (f"{layer}.q.weight", (8, 8)), (f"{layer}.q.bias", (8,)), (f"{layer}.v.weight", (8, 8)))} | {"head": (2, 8)},
    {"q": {layer: f"{layer}.q" for layer in range(LAYERS)}, "v": {layer: f"{layer}.v" for layer in range(LAYERS)}},
)
SAMPLES, BATCH = 100, 16  # epochs end at 7, 13, 19, 25, 32, ...


def controller(*, warmup: str = "3 epochs", epochs: int = 40, samples: int = SAMPLES, batch: int = BATCH,
               lora: Mapping[str, Any] | None = None, **convergence: Any) -> PhaseController:
    settings = {"tau": 1.0, "zeta": 5.0, "k": 3, "m": 2} | convergence
    sections = LoraConfig(families=("q", "v"), warmup=Duration(warmup), **(lora or {}))
    phases = expanded(PresetConfig(), ConvergenceConfig(**settings), sections)
    return PhaseController(layout=LAYOUT, timeline=Timeline(samples, batch, Duration(f"{epochs} epochs")), seed=11,
                           phases=[phase.spec(("q", "v")) for phase in phases])


def epoch_end(epoch: int, samples: int = SAMPLES, batch: int = BATCH) -> int:
    return math.ceil(epoch * samples / batch)


def observe(step: int, norm: Callable[[str, int], float] = lambda family, layer: 10.0, *, loss: float = 1.0,
            samples: int = SAMPLES) -> Observation:
    return Observation(step, samples, loss, {f: {i: norm(f, i) for i in range(LAYERS)} for f in ("q", "v")})


# The change of each layer between the last two windows in per cent, and the ranks that Algorithm 2 assigns.
LATE = {"q": [0, .125, .5, 1], "v": [.8, .2, .0, .6]}
RANKS = {"q": [8, 8, 16, 64], "v": [64, 8, 8, 32]}


def settling(epoch: int) -> Observation:
    """The measurement of epoch 1, 2, ...

    Norms grow by 10 % per window up to epoch 6 and are constant from epoch 7 on, except for the small changes EARLY
    (window 4 to 5) and LATE (5 to 6). With m = 2 and k = 3, windows 4 to 6 are the first that pass, at epoch 12.
    """
    window = (epoch + 1) // 2

    def norm(family: str, layer: int) -> float:
        early = LATE[family][::-1][layer]  # other ranks, should Algorithm 2 look at the wrong windows
        return 10 * 1.1 ** min(window, 4) * (1 + early / 100) ** (window >= 5) * (
            1 + LATE[family][layer] / 100) ** (window >= 6)

    return observe(epoch_end(epoch), norm)


def drive(control: PhaseController, measure: Callable[[int], Observation], epochs: int,
          state: PhaseState | None = None, begin: int = 1) -> list[PhaseState]:
    """The states after each measurement of epochs ``begin`` to ``epochs``."""
    states = [state or control.initial()]
    for epoch in range(begin, epochs + 1):
        states.append(control.next(states[-1], measure(epoch)))
    return states[1:]


def reloaded(state: PhaseState) -> PhaseState:
    return PhaseState.from_json(json.loads(json.dumps(to_json(state))))


# ---- the walk through the phases

def test_the_run_begins_in_full_with_nothing_seen() -> None:
    state = controller().initial()
    assert state.plan.phase == "full"
    assert (state.index, state.plan.trainable) == (0, set(LAYOUT.parameters))
    assert (state.windows, state.open, state.tests) == ((), (), 0)
    assert state.reason == "training begins in phase full"


def test_full_warmup_and_lora_begin_at_the_exact_measurements() -> None:
    states = drive(controller(), settling, 40)
    phases = [state.plan.phase for state in states]
    assert phases == ["full"] * 11 + ["warmup"] * 3 + ["lora"] * 26
    assert states[11].plan.since_step == epoch_end(12) == 75
    assert states[14].plan.since_step == epoch_end(15) == 94


def test_ranks_come_from_the_changes_between_the_last_two_windows() -> None:
    plan = drive(controller(), settling, 12)[-1].plan
    assert {f: [plan.adapters[f"{i}.{f}"].rank for i in range(LAYERS)] for f in RANKS} == RANKS
    assert {spec.scaling for spec in plan.adapters.values()} == {1.0}
    assert {spec.seed for spec in plan.adapters.values()} == {11}


def test_lora_settings_reach_the_plans() -> None:
    control = controller(lora={"r_min": 2, "r_max": 4, "alpha_over_r": 2.0, "train_rest": False})
    states = drive(control, settling, 15)
    warmup, lora = states[11].plan, states[14].plan
    assert [warmup.adapters[f"{i}.q"].rank for i in range(LAYERS)] == [2, 2, 2, 4]
    assert {spec.scaling for spec in warmup.adapters.values()} == {2.0}
    assert lora == lora_plan(LAYOUT, warmup, train_rest=False, since_step=94)
    assert lora.trainable == {name for name in warmup.trainable if "lora_" in name}


def test_the_lora_plan_is_made_of_the_warmup_plan_and_stays() -> None:
    states = drive(controller(), settling, 40)
    assert states[14].plan == lora_plan(LAYOUT, states[13].plan, since_step=94)
    assert all(state.plan is states[14].plan for state in states[15:])


def test_the_plan_changes_at_transitions_only() -> None:
    control = controller()
    states = [control.initial(), *drive(control, settling, 40)]
    changed = [epoch for epoch in range(1, 41) if states[epoch].plan != states[epoch - 1].plan]
    assert changed == [12, 15]


@pytest.mark.parametrize(("warmup", "last"), [("1 epoch", 13), ("5 epochs", 17), ("15 epochs", 27)])
def test_the_warmup_lasts_exactly_its_epochs(warmup: str, last: int) -> None:
    states = drive(controller(warmup=warmup), settling, 40)
    assert [s.plan.phase for s in states].count("warmup") == last - 12
    assert states[-1].plan.since_step == epoch_end(last)


@given(st.integers(10, 300), st.integers(1, 60), st.integers(1, 9))
def test_the_warmup_ends_at_an_epoch_end_whatever_the_batch(samples: int, batch: int, epochs: int) -> None:
    batch = min(batch, samples)
    control = controller(warmup=f"{epochs} epochs", samples=samples, batch=batch, k=2, m=1)
    state, begun, over = control.initial(), None, None
    for epoch in range(1, 30):
        step = epoch_end(epoch, samples, batch)
        state = control.next(state, observe(step, samples=samples))
        if state.plan.phase == "warmup" and begun is None:
            begun = epoch
        if state.plan.phase == "lora" and over is None:
            over = epoch
            assert state.plan.since_step == step
    assert (begun, over) == (2, 2 + epochs)


# The warm-up begins at step 75; the next epochs end at 82, 88 and 94.
@pytest.mark.parametrize(("steps", "end"), [(1, 82), (7, 82), (8, 88), (13, 88), (14, 94)])
def test_a_warmup_in_steps_ends_at_the_first_measurement_at_or_after_it(steps: int, end: int) -> None:
    plan = drive(controller(warmup=f"{steps} steps"), settling, 20)[-1].plan
    assert (plan.phase, plan.since_step) == ("lora", end)


# ---- Algorithm 1 is asked when a window closes, in FULL

def test_algorithm_1_is_evaluated_only_when_a_window_closes_and_only_in_full() -> None:
    tests = [state.tests for state in drive(controller(), settling, 40)]
    # Windows close at even epochs; the third is the first that can be tested, and the fourth test passes.
    assert tests == [0] * 5 + [1, 1, 2, 2, 3, 3] + [4] * 29


def test_a_run_that_never_settles_stays_in_full() -> None:
    states = drive(controller(), lambda epoch: observe(epoch_end(epoch), lambda f, i: 1.02 ** epoch), 40)
    assert {state.plan.phase for state in states} == {"full"}
    assert states[-1].tests == 18


@pytest.mark.parametrize("factor", [.95, 1.05])
def test_a_loss_that_moves_holds_the_transition_back(factor: float) -> None:
    state = drive(controller(), lambda epoch: observe(epoch_end(epoch), loss=factor ** epoch), 40)[-1]
    assert (state.plan.phase, state.tests) == ("full", 18)


def test_a_loss_that_is_nan_once_holds_back_until_its_window_is_out_of_sight() -> None:
    states = drive(controller(), lambda epoch: observe(epoch_end(epoch), loss=math.nan if epoch == 5 else 1.0), 20)
    assert [s.plan.phase for s in states[:12]] == ["full"] * 11 + ["warmup"]  # windows 3, 4 and 5


@pytest.mark.parametrize(("m", "k"), [(1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (4, 5)])
def test_still_norms_pass_at_the_first_test_when_k_windows_of_m_are_full(m: int, k: int) -> None:
    states = drive(controller(m=m, k=k), lambda epoch: observe(epoch_end(epoch)), m * k)
    assert [s.plan.phase for s in states] == ["full"] * (m * k - 1) + ["warmup"]
    assert states[-1].tests == 1
    assert all(spec.rank == 8 for spec in states[-1].plan.adapters.values())  # all changes equal


# ---- windows

@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_windows_are_disjoint_of_m_measurements_and_go_on_through_all_phases(m: int) -> None:
    states = drive(controller(m=m), lambda epoch: observe(epoch_end(epoch), loss=1 + epoch / 1e4), 40)
    kept = KEPT_WINDOWS  # older ones are dropped, and the numbers continue
    assert states[-1].plan.phase == "lora"
    for epoch, state in enumerate(states, 1):
        assert [o.step for o in state.open] == [epoch_end(e) for e in range(epoch - epoch % m + 1, epoch + 1)]
        numbers = list(range(epoch // m))[-kept:]
        assert [w.index for w in state.windows] == numbers
        assert [w.last_step for w in state.windows] == [epoch_end(m * (i + 1)) for i in numbers]
        for i, window in zip(numbers, state.windows, strict=True):
            members = range(m * i + 1, m * (i + 1) + 1)
            assert window.loss == pytest.approx(1 + sum(members) / m / 1e4, rel=1e-12)


def test_the_window_statistic_is_the_configs() -> None:
    for statistic, expected in (("mean", 102.5), ("last", 103.0)):
        control = controller(statistic=statistic)
        states = drive(control, lambda epoch: observe(epoch_end(epoch), lambda f, i: 101.0 + epoch), 2)
        assert states[-1].windows[0].norms["q"] == dict.fromkeys(range(LAYERS), expected)


def test_the_aggregate_is_the_configs() -> None:
    def measure(epoch: int) -> Observation:  # the change of the mean is .636 %, the mean of the changes 2.6 %
        return observe(epoch_end(epoch), lambda f, i: [[10, 100], [10.5, 100.2]][epoch - 1][i % 2])

    phases = {a: drive(controller(m=1, k=2, aggregate=a), measure, 2)[-1].plan.phase
              for a in ("norm_of_mean", "mean_of_layers")}
    assert phases == {"norm_of_mean": "warmup", "mean_of_layers": "full"}


# ---- the baseline

def test_without_convergence_nothing_changes_ever() -> None:
    control = PhaseController(layout=LAYOUT, timeline=Timeline(SAMPLES, BATCH, Duration("40 epochs")),
                              phases=[PhaseSpec("full")], seed=11)
    state = control.initial()
    assert all(after == state for after in drive(control, lambda epoch: observe(epoch_end(epoch)), 40))
    assert state.plan.phase == "full"


# ---- reasons

def test_reasons_say_what_was_decided_and_by_which_figures() -> None:
    reasons = [state.reason for state in drive(controller(), settling, 20)]
    assert reasons[:5] == ["training begins in phase full"] * 5
    assert reasons[5] == reasons[6]
    assert reasons[5].startswith("q changed by 10 % between windows ")
    assert reasons[9] == reasons[10] == "q changed by 10 % between windows 2 and 3 (tau 1 %)"
    assert reasons[11].startswith("Algorithm 1 passed at test 4: all |dW| <= 0.40")
    assert reasons[11].endswith("(tau 1 %), all |dL| <= 0 % (zeta 5 %) over windows 3-5")
    assert reasons[12] == reasons[13] == reasons[11]
    assert reasons[14:] == ["phase warmup has lasted 3 epochs"] * 6


def test_the_reason_names_the_loss_when_the_loss_moved() -> None:
    state = drive(controller(), lambda epoch: observe(epoch_end(epoch), loss=2.0 ** -((epoch + 1) // 2)), 6)[-1]
    assert state.reason == "loss changed by -50 % between windows 0 and 1 (zeta 5 %)"


# ---- PhaseState as JSON

@pytest.mark.parametrize("stop", range(0, 21))
def test_a_state_read_back_from_json_goes_on_just_the_same(stop: int) -> None:
    control = controller()
    states = [control.initial(), *drive(control, settling, 20)]
    assert reloaded(states[stop]) == states[stop]
    assert drive(control, settling, 20, reloaded(states[stop]), stop + 1) == states[stop + 1:]


@given(st.lists(st.tuples(st.sampled_from([.9, 1.0, 1.003, 1.03]), st.sampled_from([.9, 1.0, 1.001])), min_size=1,
                max_size=25), st.integers(1, 3), st.integers(2, 4), st.sampled_from(["mean", "last"]))
def test_a_run_whose_state_goes_through_json_every_time_is_the_same_run(
    moves: list[tuple[float, float]], m: int, k: int, statistic: str
) -> None:
    control = controller(m=m, k=k, statistic=statistic, warmup="2 epochs")
    norm, loss, measured = 10.0, 1.0, []
    for epoch, (norm_factor, loss_factor) in enumerate(moves, 1):
        norm, loss = norm * norm_factor, loss * loss_factor
        measured.append(observe(epoch_end(epoch), lambda f, i, norm=norm: norm * (1 + i / 7), loss=loss))
    straight, through_json, passed = control.initial(), control.initial(), False
    for n, observation in enumerate(measured, 1):
        straight = control.next(straight, observation)
        through_json = control.next(reloaded(through_json), observation)
        assert through_json == straight
        assert len(straight.windows) == n // m
        passed = passed or (n % m == 0 and n >= m * k and partially_converged(
            straight.windows, k=k, tau=1.0, zeta=5.0).passed)
        assert (straight.plan.phase != "full") == passed
        assert straight.tests <= max(0, n // m - k + 1)


# ---- cycles of merges

def relora(every: str, *, rewarm: str | None = None, until: str = "30 steps") -> PhaseController:
    """Full training for 10 steps, then merges ``every`` so often; the run has 60 steps."""
    merge = Merge(Duration(every), Reset(), None if rewarm is None else Duration(rewarm))
    phases = [PhaseSpec("full", until=Duration("10 steps")),
              PhaseSpec("relora", Adapters("lora", ("q", "v"), UniformRank(4)), ("adapters",), Duration(until),
                        merge=merge),
              PhaseSpec("last", train=("adapters",))]
    timeline = Timeline(SAMPLES, BATCH, Duration("60 steps"))
    return PhaseController(layout=LAYOUT, timeline=timeline, phases=phases, seed=0)


def cycles(control: PhaseController) -> tuple[list[int], PhaseState]:
    """The steps after which a cycle began, and the last state; every step is observed."""
    state, begun = control.initial(), []
    for step in range(1, 61):
        before = state
        state = control.next(state, Observation(step, step * BATCH, 1.0, {}))
        state = control.after_step(reloaded(state), step)
        if state.plan.cycle != before.plan.cycle:
            begun.append(step)
    return begun, state


def test_cycles_are_counted_from_the_start_of_their_phase() -> None:
    begun, state = cycles(relora("7 steps"))
    assert begun == [17, 24, 31, 38], "and none at its own start or after its end"
    assert (state.plan.phase, state.plan.cycle, state.restarts) == ("last", 4, ())


def test_a_merge_is_a_restart_of_the_learning_rate_if_it_rewarms() -> None:
    _, state = cycles(relora("7 steps", rewarm="3 steps"))
    assert state.restarts == (Restart(38, 3),), "earlier ones decide no later rate"


@dataclass(frozen=True)
class Constant:
    """A schedule without warm-up and decay, so that only restarts change the rate."""

    lr: float = 1.0
    warmup: Duration = field(default_factory=lambda: Duration("0 steps"))
    min_lr_ratio: float = 1.0


@pytest.mark.parametrize("local", [False, True])
def test_rates_are_those_of_all_restarts_although_the_state_keeps_only_some(local: bool) -> None:
    """With `optimizer: local` adapters look at earlier steps of the schedule, where earlier restarts count."""
    selection = Selection("random", every=Duration("3 steps"), k=6, local_rate=local)
    control = relora("7 steps", rewarm="3 steps", until="90 steps")
    control = control.with_phases([control.phases[0], replace(control.phases[1], selection=selection)])
    state, merges = control.initial(), [17, 24, 31, 38, 45, 52, 59]
    for step in range(1, 61):
        state = control.next(state, Observation(step, step * BATCH, 1.0, {}))
        state = control.after_step(reloaded(state), step, importance=dict.fromkeys(state.plan.adapters, 1.0))
        everything = replace(state, restarts=tuple(Restart(merge, 3) for merge in merges if merge <= step))
        assert control.rates(state, step + 1, Constant()) == control.rates(everything, step + 1, Constant())
    assert len(state.restarts) == (4 if local else 1) < len(merges)


def test_the_state_of_a_long_run_with_merges_choices_and_windows_stays_below_a_bound() -> None:
    """After 600 windows, 1,200 merges and 2,000 choices it is as large as after the windows that it keeps."""
    selection = Selection("random", every=Duration("3 steps"), k=1)
    merge = Merge(Duration("5 steps"), Reset(), Duration("2 steps"))
    phases = [PhaseSpec("relora", Adapters("lora", ("q", "v"), UniformRank(4)), ("adapters",),
                        PreloraTest(k=3, m=10, tau=1e-9, zeta=1e-9), merge=merge, selection=selection),
              PhaseSpec("last", train=("adapters",))]
    control = PhaseController(layout=LAYOUT, timeline=Timeline(SAMPLES, BATCH, Duration("6000 steps")), phases=phases,
                              seed=0)
    state, sizes = control.initial(), []
    for step in range(1, 6_000):
        state = control.next(state, observe(step, lambda family, layer, step=step: 10.0 + step % 7))
        state = control.after_step(state, step, importance=dict.fromkeys(state.plan.adapters, 0.25))
        if step % 500 == 499:
            sizes.append(len(json.dumps(to_json(state))))
    assert (state.plan.cycle, state.tests, len(state.windows)) == (1199, 597, KEPT_WINDOWS)
    assert max(sizes) < 32 * 1024
    assert max(sizes) - sizes[0] < 512, "numbers of steps and samples get more digits"


def test_a_cycle_in_epochs_ends_with_an_epoch() -> None:
    begun, _ = cycles(relora("1 epoch"))
    assert begun == [13, 19, 25, 32, 38]


def test_the_last_step_of_a_run_merges_nothing() -> None:
    control = relora("10 steps", until="90 steps")
    assert cycles(control)[0] == [20, 30, 40, 50]


def test_a_merge_does_not_need_a_new_engine() -> None:
    control = relora("7 steps")
    state = control.initial()
    for step in range(1, 17):
        state = control.after_step(control.next(state, Observation(step, step * BATCH, 1.0, {})), step)
    after = control.after_step(control.next(state, Observation(17, 17 * BATCH, 1.0, {})), 17)
    assert after.plan != state.plan and after.plan.structure() == state.plan.structure()


# ---- selections of adapters

def dyna(**parameters: Any) -> PhaseController:
    """Adapters on 8 linears from step 10 on, of which some train at a time; the run has 60 steps."""
    phases = [PhaseSpec("full", until=Duration("10 steps")),
              PhaseSpec("dyna", Adapters("lora", ("q", "v"), UniformRank(4)), ("adapters", "head"),
                        selection=Selection(**parameters))]
    layout = replace(LAYOUT, blocks={f"{layer}.": layer for layer in range(LAYERS)})
    timeline = Timeline(SAMPLES, BATCH, Duration("60 steps"))
    return PhaseController(layout=layout, timeline=timeline, phases=phases, seed=0)


def choices(control: PhaseController, importance: Mapping[str, float]) -> dict[int, frozenset[str]]:
    """Step -> the adapters that train after it, where they change; each step has the same importance."""
    state, found = control.initial(), {}
    for step in range(1, 61):
        before = active_adapters(state.plan, LAYOUT)
        state = control.next(state, Observation(step, step * BATCH, 1.0, {}))
        state = control.after_step(reloaded(state), step, importance=importance if state.index else {})
        if active_adapters(state.plan, LAYOUT) != before:
            found[step] = active_adapters(state.plan, LAYOUT)
    return found


IMPORTANT = {f"{layer}.{family}": 10.0 * layer + (family == "v") for layer in range(LAYERS) for family in ("q", "v")}


def test_the_first_choice_is_drawn_and_the_next_is_by_importance() -> None:
    found = choices(dyna(choose="top_k", k=2, every=Duration("20 steps")), IMPORTANT)
    assert list(found) == [10, 30], "the choice after 50 steps is the same as that after 30"
    assert len(found[10]) == 2 and found[30] == {"3.q", "3.v"}


def test_a_single_further_choice_is_made_when_it_is_asked_for() -> None:
    found = choices(dyna(choose="top_k", share=0.25, once_at=Duration("5 steps")), IMPORTANT)
    assert list(found) == [10, 15] and found[15] == {"3.q", "3.v"}


def test_discounted_choices_prefer_what_has_trained_little() -> None:
    """Over many choices every adapter has its turn, and the sums are those of all steps."""
    control = dyna(choose="discounted", k=2, every=Duration("1 steps"))
    found = choices(control, dict.fromkeys(IMPORTANT, 1.0))
    assert frozenset().union(*found.values()) == set(IMPORTANT)


def test_the_head_trains_whatever_is_chosen_unless_it_lies_below() -> None:
    for cut in (False, True):
        control = dyna(choose="top_k", k=1, every=Duration("5 steps"), cut_backward=cut)
        state = control.initial()
        for step in range(1, 16):
            state = control.next(state, Observation(step, step * BATCH, 1.0, {}))
            state = control.after_step(state, step, importance=IMPORTANT if state.index else {})
        assert state.plan.training() == {"3.v.lora_A.weight", "3.v.lora_B.weight", "head"}
        assert sum(state.updates.values()) == 5, "one adapter per step"


def test_a_skipped_update_is_not_counted() -> None:
    control = dyna(choose="random", k=1, every=Duration("50 steps"))
    state = control.initial()
    for step in range(1, 14):
        state = control.next(state, Observation(step, step * BATCH, 1.0, {}))
        state = control.after_step(state, step, updated=step != 12)
    assert sum(state.updates.values()) == 2


def test_all_adapters_train_in_the_step_before_a_choice_by_their_gradients() -> None:
    control = dyna(choose="top_k", k=1, every=Duration("5 steps"), importance="backward")
    state, sizes = control.initial(), {}
    for step in range(1, 21):
        active = active_adapters(state.plan, LAYOUT)
        state = control.next(state, Observation(step, step * BATCH, 1.0, {}))
        state = control.after_step(reloaded(state), step, importance={path: IMPORTANT[path] for path in active})
        sizes[step + 1] = len(active_adapters(state.plan, LAYOUT))
    assert [step for step, size in sizes.items() if size == 8 and step > 10] == [15, 20], sizes
    assert all(size == 1 for step, size in sizes.items() if step > 10 and step not in (15, 20))
    assert active_adapters(state.plan, LAYOUT) == {"3.v"}
    assert state.importance == {path: 2 * value for path, value in IMPORTANT.items()}, "of these two steps only"


def test_an_adapter_with_a_local_rate_advances_only_when_it_is_updated() -> None:
    control = dyna(choose="top_k", k=1, every=Duration("5 steps"), local_rate=True)
    state = control.initial()
    assert control.own_steps(state) == {}, "the phase before has no adapters"
    for step in range(1, 21):
        state = control.next(state, Observation(step, step * BATCH, 1.0, {}))
        if step == 10:
            first = active_adapters(state.plan, LAYOUT)
            assert control.own_steps(state) == dict.fromkeys(first, 11)
        state = control.after_step(state, step, importance=IMPORTANT if state.index else {}, updated=step != 12)
    assert control.own_steps(state) == {"3.v": 16}, "it was chosen after step 15 and has trained for 5 steps"
    everyone = dyna(choose="top_k", k=1, every=Duration("5 steps"))
    assert everyone.own_steps(state) == {}


def test_adapters_that_no_longer_change_leave_and_do_not_return() -> None:
    """After step 10 the norms of the lower half stand still; later those of the upper half do, and the lower move."""
    test = PreloraTest(0.001, 0.001, k=2, m=1)
    phases = [PhaseSpec("full", until=Duration("10 steps")),
              PhaseSpec("dyna", Adapters("lora", ("q", "v"), UniformRank(4)), ("adapters",), until=test,
                        selection=Selection("unconverged", tau=1.0, every=Duration("5 steps"))),
              PhaseSpec("last", train=("adapters",))]
    control = PhaseController(layout=LAYOUT, timeline=Timeline(SAMPLES, BATCH, Duration("60 steps")), phases=phases,
                              seed=0)
    state, found = control.initial(), {}
    for step in range(1, 41):
        still = (0, 1) if step <= 20 else (2, 3)
        norms = {family: {layer: 100.0 if layer in still else 100.0 * 1.1 ** step for layer in range(LAYERS)}
                 for family in ("q", "v")}
        state = control.next(state, Observation(step, 1, 1.0 + step, norms))
        state = control.after_step(reloaded(state), step)
        if state.index:
            found[step] = active_adapters(state.plan, LAYOUT)
    upper = {f"{layer}.{family}" for layer in (2, 3) for family in ("q", "v")}
    assert found[10] == found[14] == set(IMPORTANT), "all of them at first"
    assert found[15] == found[24] == upper
    assert found[25] == {"3.v"}, "nothing changes any longer, and the lower adapters do not return"


# ---- components that are pruned

def test_components_are_pruned_from_when_the_adapters_were_attached_into_later_phases() -> None:
    options = {"begin": "5 steps", "end": "20 steps", "every": "4 steps"}
    new = Adapters("adalora", ("q", "v"), UniformRank(4), options=options)
    phases = [PhaseSpec("full", until=Duration("10 steps")), PhaseSpec("joint", new, until=Duration("8 steps")),
              PhaseSpec("lora", train=("adapters",), until=Duration("20 steps")),
              PhaseSpec("again", new, ("adapters",), until=Duration("6 steps")),
              PhaseSpec("head", train=("hea.",))]
    control = PhaseController(layout=LAYOUT, timeline=Timeline(SAMPLES, BATCH, Duration("60 steps")), phases=phases,
                              seed=0)
    state, found = control.initial(), {}
    for step in range(1, 61):
        found[step] = control.cut(state, step)
        state = control.next(state, Observation(step, step * BATCH, 1.0, {}))
        state = control.after_step(reloaded(state), step, updated=step != 30)
    assert all(found[step] is None for step in (*range(1, 11), *range(45, 61))), "no such adapters train"
    pruned = {step: cut.keep for step, cut in found.items() if cut is not None and cut.keep is not None}
    assert pruned == {19: 22, 23: 17, 27: 16, 30: 16, 31: 16}, "32 components"
    assert [step for step, cut in found.items() if cut is not None and cut.final] == list(range(32, 39))


# ---- ranks that change during a phase

def test_ranks_are_chosen_again_by_the_windows_that_have_closed() -> None:
    """Layer 3 changes most until step 20, layer 0 after it."""
    test = PreloraTest(0.001, 0.001, k=2, m=1)
    again = Adapters("lora", ("q",), PreloraRanks(4, 16), rechosen=Duration("10 steps"))
    phases = [PhaseSpec("full", until=Duration("10 steps")), PhaseSpec("lora", again, ("adapters",), until=test),
              PhaseSpec("last", train=("adapters",))]
    control = PhaseController(layout=LAYOUT, timeline=Timeline(SAMPLES, BATCH, Duration("60 steps")), phases=phases,
                              seed=0)
    state, norms, ranks = control.initial(), dict.fromkeys(range(LAYERS), 100.0), {}
    for step in range(1, 41):
        norms = {layer: norm * (1 + (layer if step <= 20 else LAYERS - layer) / 100) for layer, norm in norms.items()}
        before = state.plan
        state = control.next(state, Observation(step, 1, 1.0 + step, {"q": norms}))
        state = control.after_step(reloaded(state), step)
        if state.plan != before:
            ranks[step] = [spec.rank for spec in state.plan.adapters.values()]
    assert ranks == {10: [4, 4, 8, 16], 30: [16, 8, 4, 4]}, "after 20 steps they were the same"
    assert (state.plan.since_step, state.plan.cycle, state.ranked) == (10, 0, 40)


def test_resized_adapters_continue_their_cycle() -> None:
    layers = {"q": {layer: 4 for layer in range(LAYERS)}}
    first = PhaseSpec("a", Adapters("lora", ("q",), UniformRank(4)), ("adapters",))
    rank_4 = plan_of(first, LAYOUT, seed=0, ranks=layers)
    for resized, cycle in ((True, 0), (False, 1)):
        spec = PhaseSpec("b", Adapters("lora", ("q",), UniformRank(8), resized=resized), ("adapters",))
        ranks = {"q": {layer: 8 for layer in range(LAYERS)}}
        assert plan_of(spec, LAYOUT, seed=0, before=rank_4, ranks=ranks).cycle == cycle
