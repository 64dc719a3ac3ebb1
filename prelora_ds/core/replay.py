"""Decide again, from logged observations, when phases would have ended: with other thresholds, or another method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from prelora_ds.core.controller import PhaseController, PhaseState
from prelora_ds.core.duration import Duration
from prelora_ds.core.phases import PhaseSpec
from prelora_ds.core.switch_tests.combined import with_single_tests
from prelora_ds.core.switch_tests.prelora import NOISE, Observation, PreloraTest
from prelora_ds.core.switch_tests.protocol import SwitchTest


@dataclass(frozen=True)
class Decision:
    """A phase that begins, or ranks that are chosen again, after ``step``.

    extrapolated: whether the run itself had decided otherwise before, so that its losses and norms would have been
        others than those in the log.
    """

    step: int
    state: PhaseState
    extrapolated: bool = False


@dataclass(frozen=True)
class Closest:
    """The test that came closest to passing: by the value that exceeded its threshold by the smallest factor.

    what: a family or ``loss`` for Algorithm 1, otherwise what the test compares.
    change, threshold: the value and its limit, for Algorithm 1 in per cent.
    """

    step: int
    what: str
    change: float
    threshold: float

    @property
    def excess(self) -> float:
        return self.change / self.threshold if math.isfinite(self.change) else math.inf


@dataclass(frozen=True)
class Replay:
    """What a controller decides from a log.

    decisions: oldest first; the first phase is not one of them.
    closest: of the tests of the last phase that was reached; None if it made none.
    """

    decisions: tuple[Decision, ...]
    closest: Closest | None


@dataclass(frozen=True)
class Start:
    """The state of the controller after ``step``, before the first observation: a fork does not begin at step 0."""

    state: PhaseState
    step: int


def replay(controller: PhaseController, observations: Iterable[Observation], start: Start | None = None) -> Replay:
    """Let ``controller`` decide from ``observations``, oldest first, as a run does.

    start: None for a run that began at step 0.

    Which adapters are active is not decided: no log has the importance of every step, and no decision depends on it.
    """
    controller = controller.with_phases([replace(spec, selection=None) for spec in controller.phases])
    total = controller.timeline.total_steps
    state = controller.initial() if start is None else start.state
    done = 0 if start is None else start.step
    decisions: list[Decision] = []
    closest: Closest | None = None
    for observation in observations:
        state = _merged(controller, state, done, observation.step)
        done = observation.step
        before, state = state, controller.next(state, observation)
        if state.tests > before.tests and state.index == before.index:
            found = _closest(controller, state, done)
            both = [each for each in (closest, found) if each is not None]
            closest = min(both, key=lambda each: each.excess, default=None)
        if done == total:
            break  # a decision after the last step is not followed
        if state.plan.structure() != before.plan.structure():
            decisions.append(Decision(done, state))
            closest = None
        state = controller.after_step(state, done)
    return Replay(tuple(decisions), closest)


def _merged(controller: PhaseController, state: PhaseState, after: int, before: int) -> PhaseState:
    """The state after the steps between two observations, in which only merges can happen."""
    if controller.phases[state.index].merge is None:
        return state
    for step in range(after + 1, before):
        state = controller.after_step(state, step)
    return state


def compared(decisions: Sequence[Decision], own: Sequence[Decision]) -> tuple[Decision, ...]:
    """``decisions``, with those marked that follow one which the run, whose decisions are ``own``, did not make.

    The first decision that differs still rests on the log alone. The same holds where the run decided and these did
    not: what follows that step is extrapolated.
    """
    ours = [(each.step, each.state.plan.structure()) for each in decisions]
    theirs = [(each.step, each.state.plan.structure()) for each in own]
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)))
    first = min((each[0] for each in (*ours[same:same + 1], *theirs[same:same + 1])), default=math.inf)
    return tuple(replace(each, extrapolated=each.step > first) for each in decisions)


def with_tests(phases: Sequence[PhaseSpec], change: Callable[[SwitchTest], SwitchTest]) -> tuple[PhaseSpec, ...]:
    """``phases`` with ``change`` applied to each single test."""
    return tuple(spec if spec.until is None or isinstance(spec.until, Duration)
                 else replace(spec, until=with_single_tests(spec.until, change)) for spec in phases)


def coarser(observations: Iterable[Observation], steps: frozenset[int]) -> Iterator[Observation]:
    """Join the observations up to each of ``steps`` to one, as a run that observes only there would have made it."""
    losses: list[float] = []
    samples = 0
    for observation in observations:
        losses.append(observation.loss * observation.samples)
        samples += observation.samples
        if observation.step in steps:
            yield replace(observation, samples=samples, loss=math.fsum(losses) / samples)
            losses, samples = [], 0


@dataclass(frozen=True)
class Suggestion:
    """Thresholds in per cent with which Algorithm 1 passes first after ``step``."""

    step: int
    tau: float
    zeta: float


def suggested(controller: PhaseController, observations: Iterable[Observation], step: int,
              start: Start | None = None) -> Suggestion | None:
    """Thresholds with which the first test by Algorithm 1 passes as near to ``step`` as the log allows.

    They are the largest changes of one test, rounded up to 4 digits, so a pair that would pass earlier counts with that
    earlier step. None if no test was made, or no change was finite and above 0.
    """
    tests = _changes_of_tests(controller, observations, start)
    found = []
    for _, *changes in tests:
        if all(0 < change < math.inf for change in changes):
            tau, zeta = map(_rounded_up, changes)
            first = next(when for when, norm, loss in tests if norm <= tau and loss <= zeta)
            found.append(Suggestion(first, tau, zeta))
    return min(found, key=lambda each: abs(each.step - step), default=None)


def _changes_of_tests(controller: PhaseController, observations: Iterable[Observation],
                      start: Start | None) -> list[tuple[int, float, float]]:
    """The step, and the smallest tau and zeta that would pass, of each test in the first phase with a test.

    No test passes here, so that this phase lasts to the end of the log.
    """
    tried = controller.with_phases(with_tests(controller.phases, _unpassable))
    state = tried.initial() if start is None else start.state
    found = []
    for observation in observations:
        before, state = state, tried.next(state, observation)
        test = tried.phases[state.index].until
        if isinstance(test, PreloraTest) and state.tests > before.tests:
            verdict = tried.verdict(state, test, observation.step)
            norms = [abs(change) for changes in verdict.norm_changes.values() for change in changes]
            norm = _largest(norms) + (2 * NOISE if test.strict else 0)
            found.append((observation.step, norm, _largest(map(abs, verdict.loss_changes))))
    return found


_SMALLEST = 1e-300  # a threshold that only a change of 0 keeps


def _unpassable(test: SwitchTest) -> SwitchTest:
    return replace(test, tau=_SMALLEST, zeta=_SMALLEST) if isinstance(test, PreloraTest) else test


def _largest(changes: Iterable[float]) -> float:
    """The largest change, or infinity if one is not a number."""
    return max(change if math.isfinite(change) else math.inf for change in changes)


def _rounded_up(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return math.ceil(value / unit) * unit


def _closest(controller: PhaseController, state: PhaseState, step: int) -> Closest | None:
    """By what the test that has just been made failed; None if it did not fail by a measured value."""
    test = controller.phases[state.index].until
    assert test is not None and not isinstance(test, Duration)
    miss = controller.verdict(state, test, step).miss
    return None if miss is None else Closest(step, miss.what, abs(miss.value), miss.limit)
