"""The phase controller: it decides from the measurements, without side effects, which plan comes next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prelora_ds.core.codec import fields_from_json
from prelora_ds.core.duration import Duration
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import PhaseSpec, layers_of, plan_of, switch_tests, windowing_of, with_ranks
from prelora_ds.core.plan import Plan
from prelora_ds.core.pruning import Cut
from prelora_ds.core.schedule import Restart, Schedule, Timeline, lr_at
from prelora_ds.core.selection import Selection, active_adapters, next_choice, with_active
from prelora_ds.core.switch_tests.combined import single_tests
from prelora_ds.core.switch_tests.prelora import Observation, Verdict, Windowing, WindowStats
from prelora_ds.core.switch_tests.progress import Progress
from prelora_ds.core.switch_tests.protocol import SwitchTest

# The smallest number of closed windows that the state keeps. A fork of this run may compare more windows than this run
# does; keeping all of them would let the state grow without bound.
KEPT_WINDOWS = 32
_PHASES_OF_0_1_0 = ("full", "warmup", "lora")


@dataclass(frozen=True)
class PhaseState:
    """The position of a run in its method.

    plan: the plan that the engine must be built from.
    index: the number of the current phase in the method's list.
    windows: the last closed windows, oldest first.
    open: the measurements of the window that has not closed yet.
    first_window: the index of the first window that began in this phase.
    reason: the last decision in words.
    tests: how often a test was evaluated so far.
    restarts: where the learning rate began to rise from 0 again, ascending; only those that a later rate depends on.
    importance: adapter -> its importance, summed since the phase began.
    updates: adapter -> the optimizer steps of this phase that updated it.
    choices: how often adapters were chosen in this phase.
    ranked: the step after which the ranks of the adapters were chosen last.
    attached: the step after which the adapters were attached.
    pruned: the last step that pruned components of the adapters, or 0.
    flops: what all steps until ``ranked`` have cost; 0 where the costs are not known.
    """

    plan: Plan
    index: int = 0
    windows: tuple[WindowStats, ...] = ()
    open: tuple[Observation, ...] = ()
    first_window: int = 0
    reason: str = ""
    tests: int = 0
    restarts: tuple[Restart, ...] = ()
    importance: Mapping[str, float] = field(default_factory=dict)
    updates: Mapping[str, int] = field(default_factory=dict)
    choices: int = 0
    ranked: int = 0
    flops: int = 0
    attached: int = 0
    pruned: int = 0

    @property
    def next_window(self) -> int:
        """The index of the window that closes next."""
        return self.windows[-1].index + 1 if self.windows else 0

    @property
    def windows_of_phase(self) -> tuple[WindowStats, ...]:
        """The closed windows that began in this phase, which its test sees."""
        return tuple(window for window in self.windows if window.index >= self.first_window)

    def without_open_window(self) -> PhaseState:
        """The same state without the measurements of the open window; the next window begins in this phase."""
        return replace(self, open=(), first_window=min(self.first_window, self.next_window))

    def without_windows(self) -> PhaseState:
        """The same state with nothing measured, so that its windows start again."""
        return replace(self, open=(), windows=(), first_window=0)

    @classmethod
    def from_json(cls, data: Any) -> PhaseState:
        """Read the JSON of a state, also of version 0.1.0. Raises CodecError, KeyError or ValueError for other data."""
        return fields_from_json(cls, {**data, "index": index_of(data)})


def index_of(state: Mapping[str, Any]) -> int:
    """The number of the phase in the JSON of a `PhaseState`, also of version 0.1.0. Raises KeyError or ValueError."""
    return int(state["index"]) if "index" in state else _PHASES_OF_0_1_0.index(state["plan"]["phase"])


class PhaseController:
    """Takes a run through the phases of its method. A transition is a new plan.

    A phase with a duration ends at the first observation after the duration has passed; a phase with a test ends at
    the observation that closes a window with which the test passes, or at any observation if the test needs no windows.
    Windows continue through all phases (`windowing_of`), but a test sees only the windows that began in its own phase.

    step_flops: the FLOPs of an optimizer step under a plan; None if they are not known. Only a budget needs them.
    """

    def __init__(self, *, layout: Layout, timeline: Timeline, phases: Sequence[PhaseSpec], seed: int,
                 step_flops: Callable[[Plan], int] | None = None) -> None:
        self.layout = layout
        self.timeline = timeline
        self.phases = phases
        self.seed = seed
        self.step_flops = step_flops
        self._kept = max([KEPT_WINDOWS,
                          *(single.k for test in switch_tests(phases) for single in single_tests(test))])

    def with_phases(self, phases: Sequence[PhaseSpec]) -> PhaseController:
        """The controller of the same run by another method."""
        return PhaseController(layout=self.layout, timeline=self.timeline, phases=phases, seed=self.seed,
                               step_flops=self.step_flops)

    def initial(self) -> PhaseState:
        """The state before the first step."""
        first = self.phases[0]
        plan = self._plan(0, None, 0, ())
        return PhaseState(plan, reason=f"training begins in phase {first.name}", choices=1)

    def next(self, state: PhaseState, observation: Observation) -> PhaseState:
        """The state after one more measurement. A transition has happened if and only if the plan differs."""
        windowing = windowing_of(self.phases, state.index)
        closed = windowing is not None and len(state.open) + 1 >= windowing.m
        if windowing is not None:
            state = _observed(state, observation, windowing, self._kept)

        after = self._ended(state, observation.step, closed=closed)
        return self._reranked(after, observation.step) if after.index == state.index else after

    def _ended(self, state: PhaseState, step: int, *, closed: bool) -> PhaseState:
        """The state in the next phase if this one ends after ``step``. closed: whether a window has just closed."""
        until = self.phases[state.index].until
        if until is None:
            return state
        if isinstance(until, Duration):
            return self._after_duration(state, until, step)
        if until.windowing is not None and closed:
            return self._tested(state, until, step)
        return self._checked(state, until, step) if until.k == 0 else state

    def _reranked(self, state: PhaseState, step: int) -> PhaseState:
        """The state with other ranks, if it is time to choose them again and enough windows have closed."""
        adapters = self.phases[state.index].adapters
        if adapters is None or adapters.rechosen is None or len(state.windows) < adapters.ranks.windows:
            return state
        if step < self.timeline.step_after(state.ranked, adapters.rechosen):
            return state
        ranks = adapters.ranks(layers_of(adapters, self.layout), state.windows, self.seed)
        plan = with_ranks(state.plan, self.layout, ranks)
        changed = sum(plan.adapters[path] != spec for path, spec in state.plan.adapters.items())
        reason = f"the ranks were chosen again, and {changed} of {len(plan.adapters)} changed"
        return replace(state, plan=plan, ranked=step, flops=self._flops(state, step), reason=reason)

    def after_step(self, state: PhaseState, step: int, *, importance: Mapping[str, float] | None = None,
                   updated: bool = True) -> PhaseState:
        """The state after a step, whose plan differs where a cycle ends or other adapters are chosen.

        importance: adapter -> its importance in this step.
        updated: whether the step's update was taken. Otherwise its importance is not counted, because it may not be
            finite.
        """
        cut = self.cut(state, step)
        if updated and cut is not None and cut.keep is not None:
            state = replace(state, pruned=step)
        return self._chosen(self._merged(state, step), step, importance or {}, updated=updated)

    def _chosen(self, state: PhaseState, step: int, importance: Mapping[str, float], *, updated: bool) -> PhaseState:
        selection = self.phases[state.index].selection
        if selection is None or state.plan.since_step == step:
            return state
        if updated:
            state = self._counted(state, selection, importance)
        if step == self.timeline.total_steps:
            return state
        if self._chooses(selection, state.plan, step):
            chosen = next_choice(selection, state.plan, self.layout, self.seed, state.choices,
                                 importance=state.importance, updates=state.updates, windows=state.windows_of_phase)
            plan = with_active(state.plan, self.layout, chosen, cut_backward=selection.cut_backward)
            return replace(state, plan=plan, choices=state.choices + 1)
        measures_next = step + 1 < self.timeline.total_steps and self._chooses(selection, state.plan, step + 1)
        if selection.measured == "backward" and measures_next:
            return replace(state, plan=replace(state.plan, active=None))  # so that all of them have a gradient
        return state

    def _counted(self, state: PhaseState, selection: Selection, importance: Mapping[str, float]) -> PhaseState:
        """The state after a step that was taken, with its importance and its updates.

        An adapter that does not train has no gradient, so a step in which not all of them train does not measure them.
        """
        active = active_adapters(state.plan, self.layout)
        updates = {path: state.updates.get(path, 0) + (path in active) for path in state.plan.adapters}
        if selection.measured == "backward" and state.plan.active is not None:
            return replace(state, updates=updates)
        summed = {path: state.importance.get(path, 0.0) + importance.get(path, 0.0) for path in state.plan.adapters}
        return replace(state, importance=summed, updates=updates)

    def own_steps(self, state: PhaseState) -> dict[str, int]:
        """The step of the schedule that gives each active adapter its learning rate in the next optimizer step.

        It is {} if the rate of adapters is that of the run. Otherwise an adapter advances only in the steps that update
        it, from the start of the phase.
        """
        selection = self.phases[state.index].selection
        if selection is None or not selection.local_rate:
            return {}
        return {path: state.plan.since_step + state.updates.get(path, 0) + 1
                for path in active_adapters(state.plan, self.layout)}

    def rates(self, state: PhaseState, step: int, schedule: Schedule) -> tuple[float, dict[str, float]]:
        """The learning rate of optimizer step ``step``, and adapter -> its rate, for adapters that have their own."""

        def rate(at: int) -> float:
            return lr_at(at, state.restarts, timeline=self.timeline, schedule=schedule)

        return rate(step), {adapter: rate(own_step) for adapter, own_step in self.own_steps(state).items()}

    def cut(self, state: PhaseState, step: int) -> Cut | None:
        """What optimizer step ``step`` prunes of the adapters; None if they are not of a kind that is pruned."""
        pruning = state.plan.pruning()
        components = 0 if pruning is None else sum(state.plan.pruned().values())
        if pruning is None or not components:
            return None
        return pruning.cut(self.timeline, components, since=state.attached, last=state.pruned, step=step)

    def _chooses(self, selection: Selection, plan: Plan, step: int) -> bool:
        if selection.once_at is not None:
            return step == self.timeline.step_after(plan.since_step, selection.once_at)
        assert selection.every is not None
        return self._ends_period(plan, selection.every, step)

    def _merged(self, state: PhaseState, step: int) -> PhaseState:
        merge = self.phases[state.index].merge
        if merge is None or step == self.timeline.total_steps or not self._ends_period(state.plan, merge.every, step):
            return state
        plan = replace(state.plan, cycle=state.plan.cycle + 1)
        restarts = self._restarts(state, step, merge.rewarm, self._earliest(state, step))
        return replace(state, plan=plan, restarts=restarts)

    def _ends_period(self, plan: Plan, every: Duration, step: int) -> bool:
        """Whether a whole number of periods has passed after ``step``, counted from the start of the plan's phase."""
        return step in self.timeline.period_ends(plan.since_step, every)

    def _tested(self, state: PhaseState, test: SwitchTest, step: int) -> PhaseState:
        """The state after a window has closed, with the verdict on it."""
        if len(state.windows_of_phase) < test.k:
            return state
        verdict = self.verdict(state, test, step)
        state = replace(state, reason=verdict.reason, tests=state.tests + 1)
        if not verdict.passed:
            return state
        return self._follow(state, step, f"{test.title} passed at test {state.tests}: {verdict.reason}")

    def _checked(self, state: PhaseState, test: SwitchTest, step: int) -> PhaseState:
        """The state after an observation that has closed no window of ``test``."""
        verdict = self.verdict(state, test, step)
        return self._follow(state, step, f"{test.title} passed: {verdict.reason}") if verdict.passed else state

    def verdict(self, state: PhaseState, test: SwitchTest, step: int) -> Verdict:
        """What ``test`` says about ``state`` after ``step``."""
        progress = Progress(step, self.timeline.total_steps)
        if "flops" in test.needs:
            assert self.step_flops is not None, "a budget needs the FLOPs of a step"
            whole = self.timeline.total_steps * self.step_flops(Plan("full", frozenset(self.layout.parameters)))
            progress = replace(progress, flops=self._flops(state, step), full_flops=whole)
        return test(state.windows_of_phase, progress)

    def _flops(self, state: PhaseState, step: int) -> int:
        """The FLOPs of all steps until ``step``, since which ``state`` has had its plan; 0 if they are not known."""
        if self.step_flops is None:
            return 0
        return state.flops + (step - state.ranked) * self.step_flops(state.plan)

    def _after_duration(self, state: PhaseState, until: Duration, step: int) -> PhaseState:
        if step < self.timeline.step_after(state.plan.since_step, until):
            return state
        return self._follow(state, step, f"phase {state.plan.phase} has lasted {until}")

    def _follow(self, state: PhaseState, step: int, reason: str) -> PhaseState:
        """The state in the next phase, which begins after ``step``.

        The phase stays the same if the ranks of the next one need more windows than have closed.
        """
        index = state.index + 1
        adapters = self.phases[index].adapters
        if adapters is not None and len(state.windows) < adapters.ranks.windows:
            waits = (f"{reason}; phase {self.phases[index].name} waits until {adapters.ranks.windows} windows have "
                     "closed, because its ranks depend on them")
            return replace(state, reason=waits)
        attaches = adapters is not None and not adapters.resized
        windowing = windowing_of(self.phases, index)
        shared = 0 if windowing is None else windowing.shared_by(len(state.open))
        return replace(state, plan=self._plan(index, state.plan, step, state.windows), index=index, reason=reason,
                       first_window=state.next_window + shared,
                       restarts=self._restarts(state, step, self.phases[index].rewarm, step + 1), importance={},
                       updates={},
                       choices=1, ranked=step, flops=self._flops(state, step),
                       attached=step if attaches else state.attached, pruned=0 if attaches else state.pruned)

    def _restarts(self, state: PhaseState, step: int, rewarm: Duration | None, earliest: int) -> tuple[Restart, ...]:
        """The restarts of the learning rate so far, with one after ``step`` if it is to rise again there.

        A rate depends only on the last restart before its step, and no step before ``earliest`` will be asked for. The
        restarts before that are left out, so that the state of a run with many merges stays small.
        """
        if rewarm is None:
            return state.restarts
        restarts = (*state.restarts, Restart(step, self.timeline.step_after(step, rewarm) - step))
        superseded = sum(restart.step <= earliest for restart in restarts) - 1
        return restarts[max(0, superseded):]

    def _earliest(self, state: PhaseState, step: int) -> int:
        """The earliest step of the schedule that gives a learning rate after ``step``, in the same phase.

        With a local rate it is that of the adapter that was updated least.
        """
        selection = self.phases[state.index].selection
        if selection is None or not selection.local_rate:
            return step + 1
        fewest = min(state.updates.get(path, 0) for path in state.plan.adapters)
        return state.plan.since_step + fewest + 1

    def _plan(self, index: int, before: Plan | None, step: int, windows: Sequence[WindowStats]) -> Plan:
        spec = self.phases[index]
        ranks = None
        if spec.adapters is not None:
            ranks = spec.adapters.ranks(layers_of(spec.adapters, self.layout), windows, self.seed)
        return plan_of(spec, self.layout, seed=self.seed, since_step=step, before=before, ranks=ranks)


def _observed(state: PhaseState, observation: Observation, windowing: Windowing, kept: int) -> PhaseState:
    """``state`` with the observation in its open window, which closes when it is complete.

    kept: how many windows the state keeps.
    """
    state = replace(state, open=(*state.open, observation))
    if len(state.open) < windowing.m:
        return state
    window = windowing.close(state.next_window, state.open)
    return replace(state, open=windowing.still_open(state.open), windows=(*state.windows, window)[-kept:])
