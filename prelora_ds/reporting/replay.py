"""`prelora replay`: decide again from a run's log, with its own settings or with others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise, product
from statistics import median
from typing import Any

from prelora_ds.config.load import load_config
from prelora_ds.config.named_tests import changed_test, make_test, name_of, parameters_of
from prelora_ds.config.phases import PresetConfig
from prelora_ds.config.preset import ConvergenceConfig, expanded
from prelora_ds.config.tree import Config
from prelora_ds.core.adapters import kind_called
from prelora_ds.core.codec import CodecError, from_json
from prelora_ds.core.controller import PhaseController, PhaseState
from prelora_ds.core.duration import Duration
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import PhaseSpec, needed_in_fp32, switch_tests, windowing_of
from prelora_ds.core.plan import Plan
from prelora_ds.core.rank_rules import RANK_RULES, RankRule
from prelora_ds.core.replay import (
    Closest,
    Decision,
    Start,
    coarser,
    compared,
    replay,
    suggested,
    with_tests,
)
from prelora_ds.core.schedule import Timeline
from prelora_ds.core.switch_tests.combined import single_tests
from prelora_ds.core.switch_tests.prelora import Observation
from prelora_ds.core.switch_tests.protocol import SwitchTest
from prelora_ds.cost.bytes import predict_bytes
from prelora_ds.cost.flops import micro_batch, step_flops
from prelora_ds.errors import ConfigError
from prelora_ds.reporting.history import parse_step
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import EventKind, read_lines, stream_lines
from prelora_ds.run.setup_record import SetupRecord, read_setup

ALGORITHM_1 = ("tau", "zeta", "k", "m")


@dataclass(frozen=True)
class Settings:
    """What is tried.

    test: the name of a test that takes the place of the run's own tests; None keeps these.
    parameters: the values of parameters of the tests, each combination of which is tried; all others are kept.
    every: how often the run would have observed.
    suggest: the share of the run near which thresholds are sought.
    ranks: a rule that gives all new adapters their ranks; None keeps the rules of the run.
    """

    test: str | None = None
    parameters: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    every: Duration | None = None
    suggest: float | None = None
    ranks: RankRule | None = None


@dataclass(frozen=True)
class Logged:
    """What the log of a run contains that decides.

    step_s: phase -> the median seconds of its steps, as measured.
    start: where a fork began; None for a run that began at step 0.
    """

    config: Config
    setup: SetupRecord
    observations: tuple[Observation, ...]
    step_s: Mapping[str, float]
    start: Start | None = None

    @property
    def timeline(self) -> Timeline:
        return Timeline(self.setup.samples, self.config.train.global_batch_size, self.config.train.duration)

    def controller(self, phases: Sequence[PhaseSpec]) -> PhaseController:
        return PhaseController(layout=self.setup.layout, timeline=self.timeline, phases=phases,
                               seed=self.config.run.seed, step_flops=step_flops(self.config, self.setup.layout))


def read_logged(folder: RunFolder) -> Logged:
    """Read the run in ``folder``. Raises ConfigError if there is no run, or if its log does not allow a replay."""
    if not folder.has_run():
        raise ConfigError("RUN", str(folder.path), "does not contain a run", "pass the run.output_dir of a run")
    setup = read_setup(folder)
    if setup is None or not folder.observations.is_file():
        missing = folder.setup if setup is None else folder.observations
        raise ConfigError("RUN", str(folder.path), f"has no {missing.name}: it was made by an earlier version",
                          "replay a run of this version; if this one has not finished, its next job writes the file")
    config = load_config(folder.config, recipe_key="RUN")
    rows = read_lines(folder.observations)
    try:
        observations = tuple(from_json(Observation, row) for row in rows)
    except (CodecError, TypeError) as exc:
        raise ConfigError("RUN", str(folder.observations), f"a row cannot be understood: {exc}",
                          "restore the file, or replay another run") from exc
    _check_fits(config, setup, observations, folder)
    if not observations:
        raise ConfigError("RUN", str(folder.path), "has not made an observation yet", "try again later")
    start = _start(folder) if folder.origin.is_file() else None
    logged = Logged(config, setup, observations, _step_seconds(folder), start)
    begun = 0 if start is None else start.step
    first = logged.timeline.next_ticks(begun, config.observe.every, 1)[0]
    if observations[0].step > first:
        raise ConfigError("RUN", str(folder.path), f"has no observations before step {observations[0].step}: an "
                          "earlier version began it", "replay a run that this version has made from its first step")
    return logged


def _start(folder: RunFolder) -> Start:
    """Where a fork began. Raises ConfigError if its log does not contain that."""
    events = read_lines(folder.events) if folder.events.is_file() else []
    fork = next((row for row in events if row["event"] == EventKind.FORK), None)
    if fork is None:
        raise ConfigError("RUN", str(folder.path), "is a fork that an earlier version began: its log does not contain "
                          "the windows with which it began", "replay the run that it began from")
    try:
        return Start(from_json(PhaseState, fork["state"]), int(fork["step"]))
    except (ValueError, KeyError, TypeError) as exc:
        raise ConfigError("RUN", str(folder.events), f"the event {EventKind.FORK} cannot be understood: {exc}",
                          "restore the file, or replay another run") from exc


def _check_fits(config: Config, setup: SetupRecord, observations: Sequence[Observation], folder: RunFolder) -> None:
    """Raise ConfigError if the files are not those of one run."""
    expected = {family: set(layers) for family, layers in setup.layout.targets.items()}
    unknown = [family for family in config.families() if family not in expected]
    if unknown or setup.samples < 1 or setup.world_size < 1:
        raise ConfigError("RUN", str(folder.setup), "does not belong to the config of this run",
                          "restore the file, or replay another run")
    for number, seen in enumerate(observations, start=1):
        if {family: set(layers) for family, layers in seen.norms.items()} != expected or seen.samples < 1:
            raise ConfigError("RUN", str(folder.observations), f"line {number} is not an observation of this model",
                              "restore the file, or replay another run")


def _step_seconds(folder: RunFolder) -> dict[str, float]:
    """Phase -> the median seconds of its steps; damaged lines are left out, because only times come from this file."""
    seconds: dict[str, list[float]] = {}
    for number, row in stream_lines(folder.metrics, lambda error: None):
        step = parse_step(row, folder.metrics, number)
        if step.step_s is not None:
            seconds.setdefault(str(row.get("phase")), []).append(step.step_s)
    return {phase: median(values) for phase, values in seconds.items()}


# ---- deciding

def replayed(logged: Logged, settings: Settings) -> dict[str, Any]:
    """Decide again, and return the decisions, one row per combination of parameters, and the suggestion, as JSON.

    Raises ConfigError for settings that the log does not allow.
    """
    observations = _observed_every(logged, settings.every)
    own = logged.config.specs()
    controller = logged.controller(own)
    run = replay(controller, logged.observations, logged.start).decisions
    grid: list[dict[str, Any]] = []
    decisions: list[dict[str, Any]] = []
    for values in product(*settings.parameters.values()):
        tried = _with_ranks(logged, _tried(logged, settings, dict(zip(settings.parameters, values, strict=True))),
                            settings.ranks)
        start = _start_with(logged, own, tried, settings)
        found = replay(controller.with_phases(tried), observations, start)
        rows = [_row(logged, tried, each) for each in compared(found.decisions, run)]
        if not grid:
            decisions = rows
        grid.append(_cell(logged, tried, rows, found.closest))
    result: dict[str, Any] = {"decisions": decisions, "grid": grid}
    if settings.suggest is not None:
        if settings.test not in (None, "prelora"):
            raise ConfigError("--suggest", settings.suggest, "finds thresholds of Algorithm 1 only", "omit --test")
        first = {key: each[0] for key, each in settings.parameters.items()}
        step = round(settings.suggest * logged.timeline.total_steps)
        tried = _tried(logged, settings, first)
        start = _start_with(logged, own, tried, settings)
        suggestion = suggested(controller.with_phases(tried), observations, step, start)
        result["suggestion"] = suggestion and asdict(suggestion)
    return result


def _observed_every(logged: Logged, every: Duration | None) -> Sequence[Observation]:
    if every is None:
        return logged.observations
    steps = logged.timeline.ticks(every)
    last = logged.observations[-1].step
    missing = sorted(step for step in steps - {each.step for each in logged.observations} if step <= last)
    if missing:
        raise ConfigError("--every", str(every), f"would observe after step {missing[0]}, but the run observed every "
                          f"{logged.config.observe.every}", "choose a multiple of that")
    return tuple(coarser(logged.observations, steps))


def _tried(logged: Logged, settings: Settings, parameters: Mapping[str, Any]) -> Sequence[PhaseSpec]:
    """The phases with another test, or with other ``parameters`` of their own tests. Raises ConfigError.

    A run without a test gets the phases of the preset `prelora`, but keeps its own if it has several and neither
    another test nor thresholds are given.
    """
    own = logged.config.specs()
    if settings.test is not None:
        phases = own if switch_tests(own) else _preset(logged.config, tau=1.0, zeta=1.0)
        return _with_test(logged, phases, settings.test, parameters)

    phases = own
    if not switch_tests(own) and (len(own) == 1 or {"tau", "zeta"} & parameters.keys()):
        for key in ("tau", "zeta"):
            if key not in parameters:
                raise ConfigError(f"--{key}", None, "is required, because no phase of this run ends by a test",
                                  f"pass it, for example --{key} {'1' if key == 'tau' else '5'}")
        phases = _preset(logged.config, parameters["tau"], parameters["zeta"])
    singles = [single for test in switch_tests(phases) for single in single_tests(test)]
    known = {key for single in singles for key in parameters_of(single)}
    for key, value in parameters.items():
        if key not in known:
            raise ConfigError(f"--set {key}", value, "is not a parameter of a test of this run"
                              + (f", which are {', '.join(sorted(known))}" if known else ", which has no tests"),
                              "choose one of them, or another test (--test)" if known else "choose a test (--test)")
    return with_tests(phases, lambda test: changed_test(test, parameters))


def _preset(config: Config, tau: float, zeta: float) -> tuple[PhaseSpec, ...]:
    test = ConvergenceConfig(tau=tau, zeta=zeta)
    return tuple(phase.spec(config.families()) for phase in expanded(PresetConfig(), test, config.lora))


def _with_test(logged: Logged, phases: Sequence[PhaseSpec], name: str,
               parameters: Mapping[str, Any]) -> Sequence[PhaseSpec]:
    """``phases`` with the test ``name`` wherever a test ends a phase.

    A test that compares no windows closes those of the run all the same, because ranks may depend on them.
    """
    test = make_test(name, parameters)
    windowing = windowing_of(phases, 0)
    if test.windowing is None and windowing is not None:
        test = make_test(name, {**parameters, "m": windowing.m})
    check_measured(test, name, logged.observations)
    if "flops" in test.needs and logged.config.model.factory is not None:
        raise ConfigError("--test", name, "needs the FLOPs of a step, which are only known for the built-in ViT",
                          "choose another test")
    if "flops" in test.needs and any(spec.selection for spec in phases):
        raise ConfigError("--test", name, "needs the FLOPs of each step, which depend on the adapters that this run "
                          "chose (active) and that a replay does not choose again", "choose another test")
    if "flops" in test.needs and logged.start is not None and logged.start.state.index and not logged.start.state.flops:
        raise ConfigError("--test", name, "needs the FLOPs of all steps so far, which the version that wrote the "
                          "checkpoint of this fork did not count", "choose another test")
    return [spec if spec.until is None or isinstance(spec.until, Duration) else replace(spec, until=test)
            for spec in phases]


def _with_ranks(logged: Logged, phases: Sequence[PhaseSpec], rule: RankRule | None) -> Sequence[PhaseSpec]:
    """``phases`` with ranks by ``rule`` wherever adapters are attached or resized. Raises ConfigError."""
    if rule is None:
        return phases
    name = next(name for name, made in RANK_RULES.items() if made is type(rule))
    check_measured(rule, name, logged.observations, option="--ranks")
    if rule.windows and (phases[0].adapters is not None or windowing_of(phases, 0) is None):
        raise ConfigError("--ranks", name, "depends on windows, but none close before the adapters are attached",
                          "choose uniform or random, or another test that closes windows (--test)")
    changed = []
    for spec in phases:
        adapters = spec.adapters
        if adapters is not None:
            can = kind_called(adapters.kind).can
            if not can.ranked or (name != "uniform" and not can.rank_per_module):
                have = "one rank for all linears" if can.ranked else "no ranks"
                raise ConfigError("--ranks", name, f"the adapters of phase {spec.name} are of the kind "
                                  f"{adapters.kind}, which has {have}", "replay a run with adapters of another kind")
            if getattr(rule, "settled", None) is not None and (adapters.resized or adapters.rechosen):
                raise ConfigError("--ranks", name, f"would remove adapters that train in phase {spec.name}",
                                  "set r_min to at least 1 and remove settled")
            spec = replace(spec, adapters=replace(adapters, ranks=rule))
        changed.append(spec)
    return changed


def check_measured(needing: SwitchTest | RankRule, name: str, observations: Sequence[Observation],
                   option: str = "--test") -> None:
    """Raise ConfigError about ``option`` if ``needing`` needs a measurement that is not in all ``observations``."""
    for measure in sorted(needing.needs - {"norms", "loss", "flops"}):
        if not all(getattr(seen, measure, None) for seen in observations):
            raise ConfigError(option, name, f"compares {measure}, which this run did not log",
                              f"log them in another run with observe.{measure}")


def _start_with(logged: Logged, own: Sequence[PhaseSpec], phases: Sequence[PhaseSpec],
                settings: Settings) -> Start | None:
    """Where the replay of a fork begins: without the windows of the source if those of ``phases`` are made otherwise.

    Raises ConfigError if the phase in which the fork began is not one of ``phases``.
    """
    if logged.start is None:
        return None
    state = logged.start.state
    if [spec.name for spec in phases[:state.index + 1]] != [spec.name for spec in own[:state.index + 1]]:
        raise ConfigError("RUN", own[state.index].name, "is the phase in which this fork began, but the method that is "
                          "replayed does not have it", "replay the run that the fork began from")
    before, after = (windowing_of(each, state.index) for each in (own, phases))
    alike = settings.every is None and before == after
    return logged.start if alike else replace(logged.start, state=state.without_windows())


# ---- rows

def _row(logged: Logged, phases: Sequence[PhaseSpec], decision: Decision) -> dict[str, Any]:
    layout, plan = logged.setup.layout, decision.state.plan
    shapes = plan.parameters(layout)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    trained = sum(sizes[name] for name in plan.trainable)
    config = _config_of(logged, plan.phase)
    predicted = predict_bytes(plan, layout, config.zero, logged.setup.world_size, after_backward=True,
                              kernel=config.kernel(config.zero.stage),
                              parked=needed_in_fp32(phases, layout, decision.state.index))
    seconds, source = _seconds(logged, plan)
    return {
        "step": decision.step,
        "epoch": logged.timeline.epoch_at(decision.step),
        "phase": plan.phase,
        "reason": decision.state.reason,
        "ranks": _ranks(plan, layout),
        "trainable_parameters": trained,
        "trainable_share": trained / sum(sizes.values()),
        "bytes": predicted.total,
        "step_s": seconds,
        "step_s_from": source,
        "extrapolated": decision.extrapolated,
    }


def _config_of(logged: Logged, phase: str) -> Config:
    """The settings of ``phase``. A phase that the run does not have takes those of its first one."""
    names = [each.name for each in logged.config.phase_list]
    return logged.config.for_phase(phase if phase in names else names[0])


def _ranks(plan: Plan, layout: Layout) -> dict[str, dict[int, int]]:
    return {family: ranks for family, layers in layout.targets.items()
            if (ranks := {layer: plan.adapters[path].rank or 0
                          for layer, path in layers.items() if path in plan.adapters})}


def _seconds(logged: Logged, plan: Plan) -> tuple[float | None, str | None]:
    """The seconds of a step under ``plan``: measured in the phase of its name, otherwise by FLOPs from the first."""
    first = logged.controller(logged.config.specs()).initial().plan
    if plan.phase in logged.step_s:
        return logged.step_s[plan.phase], "measured"
    if first.phase not in logged.step_s or logged.config.model.factory is not None:
        return None, None
    ratio = _flops(logged, plan) / _flops(logged, first)
    return logged.step_s[first.phase] * ratio, "by FLOPs"


def _flops(logged: Logged, plan: Plan) -> int:
    config = _config_of(logged, plan.phase)
    return micro_batch(config.model, plan, logged.setup.layout, 1, kernel=config.kernel(config.zero.stage)).flops


def _cell(logged: Logged, phases: Sequence[PhaseSpec], rows: Sequence[dict[str, Any]],
          closest: Closest | None) -> dict[str, Any]:
    """One combination of parameters: when the first test passed, and what that saved, or what came closest.

    Without a test it is about the last phase.
    """
    tests = [(spec.until, following.name) for spec, following in pairwise(phases)
             if spec.until is not None and not isinstance(spec.until, Duration)]
    test, after = tests[0] if tests else (None, phases[-1].name)
    passed = next((row for row in rows if row["phase"] == after), None)
    return {
        **_parameters(test),
        "step": passed and passed["step"],
        "epoch": passed and passed["epoch"],
        "hours_saved": _hours_saved(logged, rows),
        "closest": closest and asdict(closest),
    }


def _parameters(test: SwitchTest | None) -> dict[str, Any]:
    """The names and the parameters of the single tests, without parameters that are not set."""
    if test is None:
        return {"test": None, **dict.fromkeys(ALGORITHM_1)}
    singles = single_tests(test)
    parameters = [parameters_of(single) for single in singles]
    return {"test": ", ".join(map(name_of, singles)),
            **{key: value for each in parameters for key, value in each.items() if value is not None}}


def _hours_saved(logged: Logged, rows: Sequence[dict[str, Any]]) -> float | None:
    """The hours by which the run is shorter than one whose steps all take as long as those of the first phase."""
    first = logged.controller(logged.config.specs()).initial().plan.phase
    full = logged.step_s.get(first)
    if full is None or any(row["step_s"] is None for row in rows):
        return None
    begins = [(row["step"], row["step_s"]) for row in rows]
    if logged.start is not None:
        seconds, _ = _seconds(logged, logged.start.state.plan)
        begins.insert(0, (logged.start.step, full if seconds is None else seconds))
    ends = [*(step for step, _ in begins[1:]), logged.timeline.total_steps][:len(begins)]
    saved: float = sum((full - seconds) * (end - step) for (step, seconds), end in zip(begins, ends, strict=True))
    return saved / 3600
