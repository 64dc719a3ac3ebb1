"""Predict the memory and time of a recipe on a machine that need not be available."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prelora_ds.config.kinds import with_kind
from prelora_ds.config.load import check_world
from prelora_ds.config.tree import Config, ZeroSettings
from prelora_ds.core.controller import PhaseController, PhaseState
from prelora_ds.core.duration import Duration
from prelora_ds.core.layout import Layout
from prelora_ds.core.merge import Merge
from prelora_ds.core.phases import PhaseSpec, needed_in_fp32, plans_at_rank, switch_tests
from prelora_ds.core.plan import Plan
from prelora_ds.core.quantised import BF16
from prelora_ds.core.rank_rules.uniform import UniformRank
from prelora_ds.core.schedule import Timeline
from prelora_ds.core.selection import active_adapters, candidates
from prelora_ds.core.switch_tests.combined import single_tests, with_single_tests
from prelora_ds.core.switch_tests.prelora import Observation, Verdict, Windowing, WindowStats
from prelora_ds.core.switch_tests.progress import Progress
from prelora_ds.core.switch_tests.protocol import SwitchTest
from prelora_ds.cost import flops as costs
from prelora_ds.cost.bytes import FP32, predict_bytes
from prelora_ds.cost.candidates import USABLE, predict_candidate, predict_candidates, reuse_distance
from prelora_ds.cost.machines import Cluster, rates_and_memory
from prelora_ds.cost.merging import merge_work
from prelora_ds.cost.timing import Rates
from prelora_ds.errors import ConfigError

NOTES = (
    "All values are predictions. Bytes are per rank: states at the end of backward, activations at its start.",
    "peak: the larger of these two sums, with staging copies and gathered weights; it fits if it takes at most "
    f"{USABLE:.0%} of the memory.",
    "host: fp32 values, in host memory, of weights that a phase freezes, and that a later phase trains again, that "
    "adapters are merged into, or that are quantised.",
    "step: computation, optimizer and communication one after another, without loading, evaluation and checkpoints.",
    "jobs: of the given walltime, back to back; queueing, start-up and repeated steps are not included.",
)
ACTIVE_NOTE = (
    "training at a time: the first choice of adapters, which is drawn at random with run.seed. Activations and times "
    "are those of this one draw; later choices may cost more or less. Peak, fits and the largest micro-batch allow for "
    "all adapters at once."
)
MERGE_NOTE = (
    "merge: the seconds of one, if one core of the host does the rank's part; without writing the merged weights for "
    "later checkpoints. The hours of the run include all merges."
)


QUANTISED_NOTE = (
    "weights below adapters: their type where a phase quantises them. They are complete on every rank at every stage, "
    "and their fp32 values are in host memory."
)


def predict_run(config: Config, cluster: Cluster, layout: Layout, images: int, *, walltime_s: float | None = None,
                mean_rank: int = 30, calibration: Path | None = None) -> dict[str, Any]:
    """Bytes and seconds per ZeRO stage and phase, and hours and jobs of the run, as JSON.

    layout: the layout of the recipe's ViT.
    images: the number of images per epoch.
    mean_rank: the rank of every adapter whose rank a rule chooses.

    Seconds, and whether a phase fits, are None if nothing is known about the machine. In the row of a phase, ``active``
    is None unless only some adapters train at a time, ``merge`` unless its adapters are merged again and again, and
    ``base_dtype`` unless the weights below them are quantised.

    Raises ConfigError for a batch that cannot be divided, an unknown GPU, an invalid calibration, or a model that is
    not a ViT.
    """
    check_costs_are_known(config)
    world = cluster.world_size
    check_world(config, world)
    rates, memory_gib = rates_and_memory(cluster, calibration)
    accum = config.grad_accum_steps(world)
    timeline = Timeline(images, config.train.global_batch_size, config.train.duration)
    rows = []
    runs = []
    phases = config.specs()
    parked = [needed_in_fp32(phases, layout, index) for index in range(len(phases))]
    plans = plans_at_rank(phases, layout, mean_rank, seed=config.run.seed)
    for zero in _settings(config, plans, accum):
        rows_of_stage = [
            _row(config, spec, plan, layout, zero, cluster, rates, memory_gib, timeline, kept)
            for spec, plan, kept in zip(phases, plans, parked, strict=True)
        ]
        rows += rows_of_stage
        if rates is not None:
            runs.append(_run(config, layout, zero, rows_of_stage, timeline, walltime_s))

    return {
        "predicted": True,
        "recipe": config.run.name,
        **asdict(cluster),
        "world_size": world,
        "images": images,
        "mean_rank": mean_rank, "configured_stage": stage_name(config.zero),
        "micro_batch_size": config.train.micro_batch_size,
        "grad_accum_steps": accum,
        "walltime_s": walltime_s,
        "memory_gib": memory_gib,
        "rates": rates and asdict(rates),
        "rows": rows,
        "runs": runs,
        "notes": _notes(phases),
    }


def predict_kinds(config: Config, cluster: Cluster, layout: Layout, images: int, kinds: Sequence[str], *,
                  mean_rank: int = 30, calibration: Path | None = None) -> dict[str, Any]:
    """What each of ``kinds`` would cost in the last phase of a recipe with adapters, as JSON.

    The values are those of the configured ZeRO stage. In the row of a kind that is refused, ``refused`` says why and
    ``remedy`` what to do instead, and the other values are None. ``slower_than`` is the phase of full training if a
    step with the kind is predicted to take longer than one of that phase, otherwise None.

    Raises ConfigError as `predict_run` does, and for a recipe without adapters.
    """
    phases = [spec.name for spec in config.specs()]
    with_adapters = [plan.phase for plan in plans_at_rank(config.specs(), layout, mean_rank) if plan.adapters]
    if not with_adapters:
        raise ConfigError("--adapter", list(kinds), f"needs a phase with adapters, but the recipe has none in "
                          f"{', '.join(phases)}", "choose another recipe")
    phase = with_adapters[-1]
    rows = [_row_of_kind(config, kind, phase, cluster, layout, images, mean_rank, calibration) for kind in kinds]
    return {"predicted": True, "recipe": config.run.name, **asdict(cluster), "phase": phase,
            "stage": stage_name(config.for_phase(phase).zero), "mean_rank": mean_rank, "kinds": rows}


def _row_of_kind(config: Config, kind: str, phase: str, cluster: Cluster, layout: Layout, images: int, mean_rank: int,
                 calibration: Path | None) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys((
        "refused", "remedy", "ranks", "adapter_parameters", "trainable_share", "weights_bytes", "states_bytes",
        "activations_bytes", "peak_bytes", "step_s", "gflop_per_image", "slower_than"))
    row["kind"] = kind
    try:
        changed = with_kind(config, kind, mean_rank)
    except ConfigError as exc:
        key = "" if exc.key == "kind" else f"{exc.key}: "
        return {**row, "refused": f"{key}{exc.problem}", "remedy": exc.remedy}
    plans = plans_at_rank(changed.specs(), layout, mean_rank, seed=config.run.seed)
    plan = next(plan for plan in plans if plan.phase == phase)
    sizes = {name: math.prod(shape) for name, shape in plan.parameters(layout).items()}
    leaves = plan.leaves(layout)
    zero = changed.for_phase(phase).zero
    forecast = predict_run(changed, cluster, layout, images, mean_rank=mean_rank, calibration=calibration)
    by_phase = {each["phase"]: each for each in forecast["rows"]
                if (each["stage"], each["offload_optimizer"]) == (zero.stage, zero.offload_optimizer)}
    found = by_phase[phase]
    full = next((each.phase for each in plans if each.trainable == layout.parameters.keys()), None)
    slower = full in by_phase and found["step_s"] is not None and found["step_s"] > by_phase[full]["step_s"]
    return {**row, **{key: found[key] for key in row.keys() & found.keys()},
            "slower_than": full if slower else None,
            "adapter_parameters": sum(sizes[name] for name in leaves),
            "trainable_share": sum(sizes[name] for name in plan.trainable) / sum(sizes.values()),
            "states_bytes": found["gradients_bytes"] + found["masters_bytes"] + found["moments_bytes"]}


def stage_name(zero: ZeroSettings) -> str:
    """A ZeRO stage in words, such as "2 with offload"."""
    return f"{zero.stage} with offload" if zero.offload_optimizer else str(zero.stage)


def check_costs_are_known(config: Config) -> None:
    """Raise ConfigError for a model whose costs cannot be predicted."""
    if config.model.factory is not None:
        raise ConfigError("model.factory", config.model.factory, "costs can only be predicted for the built-in ViT",
                          "use a recipe without model.factory")


def fastest_images_per_s(config: Config, layout: Layout, ranks_per_host: int, world_size: int,
                         gpu: str | None) -> float | None:
    """The images per second that one rank needs in its fastest phase, as predicted for ``gpu``, a key of `GPUS`.

    The result is None without a GPU, for a model that is not a ViT, and if the hosts have different numbers of ranks.
    """
    if gpu is None or config.model.factory is not None or world_size % ranks_per_host:
        return None
    cluster = Cluster(world_size // ranks_per_host, ranks_per_host, gpu)
    # The step time does not depend on the number of images per epoch.
    rows = predict_run(config, cluster, layout, images=1)["rows"]
    step_s = min(row["step_s"] for row in rows if (zero := config.for_phase(row["phase"]).zero)
                 and (row["stage"], row["offload_optimizer"]) == (zero.stage, zero.offload_optimizer))
    return config.train.global_batch_size / world_size / float(step_s)


def _settings(config: Config, plans: Sequence[Plan], accum: int) -> Iterator[ZeroSettings]:
    """All stages that can train this recipe; also the configured one with offload, if it has offload."""
    for stage in range(4):
        runs = all(config.for_phase(plan.phase).runs_at(stage, plan) for plan in plans)
        if runs and not (stage == 0 and accum > 1):
            yield config.zero_at(stage, offload_optimizer=False)
    if config.zero.offload_optimizer:
        yield config.zero


def _notes(phases: Sequence[PhaseSpec]) -> list[str]:
    notes = list(NOTES)
    if any(spec.selection is not None for spec in phases):
        notes.append(ACTIVE_NOTE)
    if any(spec.merge is not None for spec in phases):
        notes.append(MERGE_NOTE)
    if any(spec.base_dtype != BF16 for spec in phases):
        notes.append(QUANTISED_NOTE)
    return notes


def _row(config: Config, spec: PhaseSpec, plan: Plan, layout: Layout, zero: ZeroSettings, cluster: Cluster,
         rates: Rates | None, memory_gib: float | None, timeline: Timeline, parked: frozenset[str]) -> dict[str, Any]:
    config = config.for_phase(plan.phase)
    world = cluster.world_size
    batch = config.train.global_batch_size
    micro = config.train.micro_batch_size
    kernel = config.kernel(zero.stage)
    image = costs.micro_batch(config.model, plan, layout, 1, kernel=kernel)
    configured = predict_candidate(config, plan, layout, zero, world, micro)
    step_s = rates and rates.step_seconds(configured.work, cluster.gpus_per_host)

    gathered = costs.gathered_bytes(plan, layout, zero, reuse_distance=reuse_distance(config))
    extra = costs.buckets_bytes(plan, layout, zero) + gathered
    host = predict_bytes(plan, layout, zero, world, after_backward=False, kernel=kernel, parked=parked).host
    if config.observe.spectra:  # the first values, to which they are compared
        host += FP32 * sum(math.prod(layout.parameters[f"{path}.weight"]) for path in layout.modules()) // world

    largest = memory_gib
    if memory_gib:
        settings = predict_candidates(config, plan, layout, zero, world)
        largest = max((each.micro_batch_size for each in settings if each.fits(memory_gib)), default=0)

    return {
        "stage": zero.stage,
        "offload_optimizer": zero.offload_optimizer,
        "phase": plan.phase,
        "ranks": sorted({adapter.rank for adapter in plan.adapters.values() if adapter.rank is not None}),
        "active": _active(spec, plan, layout),
        "merge": _merge(config, spec.merge, plan, layout, zero, world, rates, timeline),
        "base_dtype": None if spec.base_dtype == BF16 else spec.base_dtype,
        "weights_bytes": configured.states.weights,
        "gradients_bytes": configured.states.gradients,
        "masters_bytes": configured.states.masters,
        "moments_bytes": configured.states.moments,
        "buckets_bytes": configured.states.buffers + extra,
        "activations_bytes": micro * image.saved_bytes,
        "peak_bytes": configured.peak_bytes,
        "host_bytes": host,
        "fits": None if memory_gib is None else configured.fits(memory_gib),
        "largest_micro_batch": largest,
        "step_s": step_s,
        "epoch_s": step_s and step_s * timeline.samples / batch,
        "wire_bytes": int(configured.work.wire_gb * 1e9),
        "gflop_per_image": image.flops / 1e9,
    }


def _active(spec: PhaseSpec, plan: Plan, layout: Layout) -> dict[str, int] | None:
    """How many adapters, and how many parameters, train at a time, and how many could."""
    if spec.selection is None:
        return None
    sizes = {name: math.prod(shape) for name, shape in plan.parameters(layout).items()}
    return {
        "adapters": len(active_adapters(plan, layout)),
        "adapters_in_all": len(candidates(plan, layout)),
        "parameters": sum(sizes[name] for name in plan.training()),
        "parameters_in_all": sum(sizes[name] for name in plan.trainable),
    }


def _merge(config: Config, merge: Merge | None, plan: Plan, layout: Layout, zero: ZeroSettings, world: int,
           rates: Rates | None, timeline: Timeline) -> dict[str, Any] | None:
    """How often adapters are merged, and the seconds of a merge."""
    if merge is None:
        return None
    steps = max(1, timeline.step_after(0, merge.every))
    work = merge_work(config.model, plan, layout, merge.reset, zero, world, kernel=config.kernel(zero.stage))
    return {
        "every_steps": steps,
        "per_epoch": timeline.samples / timeline.global_batch / steps,
        "seconds": rates and work.seconds(rates, world),
    }


def _run(config: Config, layout: Layout, zero: ZeroSettings, rows: list[dict[str, Any]], timeline: Timeline,
         walltime_s: float | None) -> dict[str, Any]:
    step_s = {row["phase"]: row["step_s"] for row in rows}
    merge_s = {row["phase"]: row["merge"]["seconds"] for row in rows if row["merge"]}

    def entry(steps: dict[str, int]) -> dict[str, Any]:
        merges = merges_of_phases(config, timeline, steps)
        seconds = sum(step_s[phase] * count for phase, count in steps.items())
        seconds += sum(merge_s[phase] * count for phase, count in merges.items())
        return {"steps": steps, "merges": merges, "hours": seconds / 3600,
                "jobs": walltime_s and math.ceil(seconds / walltime_s)}

    tests = any(single.k for test in switch_tests(config.specs()) for single in single_tests(test))
    return {
        "stage": zero.stage,
        "offload_optimizer": zero.offload_optimizer,
        "earliest": entry(steps_of_phases(config, layout, timeline, passes=True)) if tests else None,
        "never": entry(steps_of_phases(config, layout, timeline, passes=False)),
    }


_NORMS = {"any": {0: 1.0}}  # of an observation that is foreseen, which nothing depends on


@dataclass(frozen=True)
class _ForeseenTest:
    """A test with a fixed outcome: it passes as soon as it is evaluated, or never."""

    k: int
    windowing: Windowing | None
    passes: bool
    title = "a test"
    needs = frozenset[str]()

    def __call__(self, windows: Sequence[WindowStats], progress: Progress) -> Verdict:
        return Verdict(self.passes, "")


@dataclass(frozen=True)
class _ForeseenRanks(UniformRank):
    """Ranks that wait for as many windows as those of a rule do."""

    windows: int


def steps_of_phases(config: Config, layout: Layout, timeline: Timeline, *, passes: bool) -> dict[str, int]:
    """The number of steps of each phase if every test passes as early as it can, or if none ever passes."""
    controller = _foreseen(config, layout, timeline, passes)
    names = [spec.name for spec in controller.phases]
    state = controller.initial()
    begun = 0
    steps = {}
    for tick, after in _course(config, controller, state, 0):
        if after.index != state.index:
            steps[names[state.index]] = tick - begun
            begun = tick
        state = after
    return {**steps, names[state.index]: timeline.total_steps - begun}


def merges_of_phases(config: Config, timeline: Timeline, steps: Mapping[str, int]) -> dict[str, int]:
    """The number of merges of each phase that has them, without that at the end of the phase.

    steps: the result of `steps_of_phases`.
    """
    merges = {}
    begun = 0
    for spec in config.specs():
        end = begun + steps.get(spec.name, 0)
        if spec.merge is not None:
            merges[spec.name] = sum(step < end for step in timeline.period_ends(begun, spec.merge.every))
        begun = end
    return merges


def why_unfinished(config: Config, layout: Layout, timeline: Timeline, state: PhaseState,
                   step: int) -> str | None:
    """Why a run with this ``state`` after ``step`` steps cannot reach its last phase.

    Returns None if it reaches the last phase when every test passes as early as it can.
    """
    controller = _foreseen(config, layout, timeline, passes=True)
    open_window = tuple(replace(seen, norms=_NORMS) for seen in state.open)
    state = end = replace(state, open=open_window)
    last = len(controller.phases) - 1
    observed = step
    for tick, after in _course(config, controller, state, step):
        if end.index == last:
            break
        observed, end = tick, after
    if end.index == last:
        return None

    spec = controller.phases[end.index]
    reason = end.reason  # that the next phase waits for windows
    if isinstance(spec.until, Duration):
        over = timeline.step_after(end.plan.since_step, spec.until)
        if over > observed:
            reason = (f"phase {spec.name} lasts until the first observation from step {over} on, "
                      "and none is made before the last step")
    elif spec.until is not None and spec.until.windowing is not None and len(end.windows_of_phase) < spec.until.k:
        reason = (f"the test of phase {spec.name} needs {spec.until.k} windows of "
                  f"{spec.until.windowing.m} observations (observe.every = {config.observe.every})")
    elif spec.until is not None and spec.until.k == 0 and not controller.verdict(end, spec.until, observed).passed:
        reason = (f"{spec.until.title}, which ends phase {spec.name}, does not pass at an observation before the last "
                  "step")
    later = ", ".join(spec.name for spec in controller.phases[end.index + 1:])
    return f"the run ends after step {timeline.total_steps}, before {later} can begin: {reason}"


def _course(config: Config, controller: PhaseController, state: PhaseState,
            step: int) -> Iterator[tuple[int, PhaseState]]:
    """The observations after ``step``, without that of the last step, and the state after each."""
    for tick in sorted(controller.timeline.ticks(config.observe.every))[:-1]:
        if tick > step:
            state = controller.next(state, Observation(tick, 1, 0.0, _NORMS))
            yield tick, state


def _foreseen(config: Config, layout: Layout, timeline: Timeline, passes: bool) -> PhaseController:
    """The controller of a run, without what only the run can determine.

    That is the result of each test that looks at windows, and ranks that depend on windows.
    """

    def foreseen(test: SwitchTest) -> SwitchTest:
        return _ForeseenTest(test.k, test.windowing, passes) if test.k else test

    phases = []
    for spec in config.specs():
        if spec.until is not None and not isinstance(spec.until, Duration):
            spec = replace(spec, until=with_single_tests(spec.until, foreseen))
        if spec.adapters is not None:
            rule = spec.adapters.ranks
            ranks = _ForeseenRanks(rule.highest, rule.windows)
            spec = replace(spec, adapters=replace(spec.adapters, ranks=ranks))
        phases.append(spec)
    needs_flops = any("flops" in test.needs for test in switch_tests(phases))
    return PhaseController(layout=layout, timeline=timeline, phases=phases, seed=0,
                           step_flops=costs.step_flops(config, layout) if needs_flops else None)
