"""The figures of a report: pure functions of the histories of runs.

Each function returns the figure, or the sentence that stands in its place because the logs lack what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from prelora_ds.reporting.history import OWNERS
from prelora_ds.reporting.report.curves import (
    Axis,
    Series,
    as_table,
    collect,
    curve_panel,
    in_numbers,
    in_words,
    threshold,
)
from prelora_ds.reporting.report.figure import Cell, Figure, Panel, Table
from prelora_ds.reporting.report.maps import bars, grouped_bars, layer_map, time_map
from prelora_ds.reporting.report.run import Phase, Run, linear_of, tests_of

Linear = tuple[str, int]  # family, layer
MOST_MAPS = 6  # of ranks
TIME_BINS = 48  # of a map over steps
ALL_OWNERS = (*OWNERS, "buffers", "host")


@dataclass(frozen=True)
class LeftOut:
    """A figure that could not be made, and why."""

    title: str
    why: str


Made = Figure | LeftOut


def all_figures(runs: Sequence[Run], most: int) -> Iterator[Made]:
    """Yield each figure of the report. most: points per figure."""
    yield weight_norms(runs, most)
    yield loss(runs, most, "step")
    yield loss(runs, most, "hours")
    yield accuracy(runs, most, "step")
    yield accuracy(runs, most, "hours")
    yield from _for_each(runs, norms_by_layer, most)
    yield norms_apart(runs, most)
    yield phases(runs)
    yield speed(runs, most)
    yield data_wait(runs, most)
    yield from _for_each(runs, state_memory, most)
    yield from _for_each(runs, ranks, most)
    yield changes(runs, most)
    yield learning_rate(runs, most)
    yield from _for_each(runs, merges, most)
    yield from _for_each(runs, active_adapters, most)


def _for_each(runs: Sequence[Run], make: Callable[[Run, str, int], Made], most: int) -> Iterator[Made]:
    """Make a figure per run; the suffix of its name is the number of the run. The points are shared between runs."""
    for number, run in enumerate(runs, start=1):
        made = make(run, "" if len(runs) == 1 else f"_{number}", most // len(runs))
        if len(runs) > 1:
            title = f"{made.title} ({run.label})"
            made = Figure(**{**vars(made), "title": title}) if isinstance(made, Figure) else LeftOut(title, made.why)
        yield made


def _curves(name: str, title: str, caption: str, series: Sequence[Series], panels: Sequence[Panel], value: str
            ) -> Figure:
    return Figure(name, title, caption, panels, as_table(series, value), in_numbers(series), in_words(series))


def _families(runs: Sequence[Run], *kinds: str) -> list[str]:
    """The families of all runs, each once, in the order of the logs."""
    return list(dict.fromkeys(family for run in runs for kind in kinds for family in run.families(kind)))


# ---- curves

def weight_norms(runs: Sequence[Run], most: int) -> Made:
    title = "Weight norms per family"
    series = collect(runs, {f"mean norm/{family}": family for family in _families(runs, "norm")}, most)
    if not series:
        return LeftOut(title, "No weight norms were logged.")
    caption = ("The Frobenius norm of W + s·B·A, as a mean over the layers of a family (Figure 1a of PreLoRA). "
               "A dashed rule is a switch; its label has the phase and the step.")
    return _curves("weight_norms", title, caption, series,
                   [Panel(title, curve_panel(series, runs, "step", "mean norm", by="curve"))], "norm")


def loss(runs: Sequence[Run], most: int, x: Axis) -> Made:
    title = f"Training loss over {x if x == 'hours' else 'steps'}"
    series = collect(runs, {"train/loss": "training loss"}, most)
    if not series:
        return LeftOut(title, "No training loss was logged.")
    hours = (" Hours are the time of training steps, waits for data and switches; evaluation, checkpoints and "
             "repeated steps are not included." if x == "hours" else "")
    caption = f"The mean loss since the row before, as logged and not smoothed (Figure 1b of PreLoRA).{hours}"
    return _curves(f"loss_over_{x}", title, caption, series,
                   [Panel(title, curve_panel(series, runs, x, "training loss"))], "loss")


def accuracy(runs: Sequence[Run], most: int, x: Axis) -> Made:
    title = f"Top-1 accuracy over {x if x == 'hours' else 'steps'}"
    columns = {"val/acc1": "validation", "train/acc1": "training"}
    series = collect(runs, columns, most, 100)
    if not any(s.label == "validation" for s in series):
        return LeftOut(title, "No validation accuracy was logged.")
    shown = [s for s in series if len(runs) == 1 or s.label == "validation"]
    caption = "Validation accuracy at each evaluation." + (
        " Training accuracy is that of the augmented images of the step." if len(shown) > len(runs) else "")
    return _curves(f"accuracy_over_{x}", title, caption, shown,
                   [Panel(title, curve_panel(shown, runs, x, "top-1, %", by="curve" if len(runs) == 1 else "run",
                                             points=True))], "acc1_percent")


def norms_by_layer(run: Run, name: str, most: int) -> Made:
    title = "Weight norms per layer"
    families = run.families()
    columns = {family: {f"norm/{family}.{layer:02d}": str(layer) for layer in run.layers(family)}
               for family in families}
    count = sum(map(len, columns.values()))
    if not count:
        return LeftOut(title, "No weight norms were logged.")
    each = {family: collect([run], columns[family], most * len(columns[family]) // count) for family in families}
    panels = [Panel(family, curve_panel(each[family], [run], "step", "norm", by="layer")) for family in families]
    every = [Series(run, f"{family}.{s.label.rjust(2, '0')}", s.points) for family in families for s in each[family]]
    caption = "The Frobenius norm of W + s·B·A of each linear (Figure 3 of PreLoRA); the color is the layer."
    return _curves(f"norms_by_layer{name}", title, caption, every, panels, "norm")


def norms_apart(runs: Sequence[Run], most: int) -> Made:
    title = "Norms of weights and adapters apart"
    parts = {"norm_base": "norm of W", "norm_adapter": "norm of s·B·A"}
    families = _families(runs, *parts)
    each = {kind: collect(runs, {f"mean {kind}/{family}": family for family in families}, most // 2) for kind in parts}
    if not all(each.values()):
        return LeftOut(title, "The logs do not have the norms of W and of s·B·A apart (norm_base, norm_adapter).")
    panels = [Panel(words, curve_panel(each[kind], runs, "step", "mean norm", by="curve"))
              for kind, words in parts.items()]
    every = [Series(s.run, f"{kind}/{s.label}", s.points) for kind in parts for s in each[kind]]
    caption = "W and s·B·A of a linear, as means over the layers of a family (Figure 6 of PreLoRA)."
    return _curves("norms_apart", title, caption, every, panels, "norm")


def _column(runs: Sequence[Run], most: int, name: str, title: str, column: str, label: str, caption: str,
            axis: Mapping[str, str] | None = None) -> Made:
    """The figure of one ``column`` over steps; ``label`` names what it measures."""
    series = collect(runs, {column: label}, most)
    if not series:
        return LeftOut(title, f"The logs do not have the {label} ({column}).")
    return _curves(name, title, caption, series, [Panel(title, curve_panel(series, runs, "step", label, axis=axis))],
                   column)


def speed(runs: Sequence[Run], most: int) -> Made:
    return _column(runs, most, "throughput", "Throughput over steps", "img_s", "images per second",
                   "Images per second of all ranks, waits for data included.")


def data_wait(runs: Sequence[Run], most: int) -> Made:
    title = "Waiting for data"
    milliseconds = collect(runs, {"data_s": "wait, ms per step"}, most // 2, 1000)
    shares = collect(runs, {"data wait": "wait, % of the time"}, most // 2)
    if not (milliseconds and shares):
        return LeftOut(title, "The time spent in waiting for data was not logged (data_s).")
    panels = [Panel("per step", curve_panel(milliseconds, runs, "step", "ms")),
              Panel("share of the time", curve_panel(shares, runs, "step", "%"))]
    caption = "Time in which rank 0 waits for its next batch, as a mean since the row before."
    return _curves("data_wait", title, caption, [*milliseconds, *shares], panels, "value")


def learning_rate(runs: Sequence[Run], most: int) -> Made:
    return _column(runs, most, "learning_rate", "Learning rate", "lr", "learning rate",
                   "The learning rate of the schedule, before the factors of single roles (lr_scale).",
                   {"format": ".1e"})


def changes(runs: Sequence[Run], most: int) -> Made:
    title = "Changes between windows, and their thresholds"
    norms = collect(runs, {f"change/{family}": family for family in _families(runs, "norm")}, most)
    losses = collect(runs, {"change/loss": "loss"}, most)
    if not (norms and losses):
        return LeftOut(title, "Fewer than two windows were closed, so there are no changes between them.")
    tests = [test for run in runs for test in tests_of(run).values()]
    panels = []
    for words, series, symbol, limits in (("weight norms", norms, "tau", sorted({test.tau for test in tests})),
                                          ("loss", losses, "zeta", sorted({test.zeta for test in tests}))):
        marks = [(sign * limit, f"{symbol} {sign * limit:+g} %") for limit in limits for sign in (1, -1)]
        scale = {"type": "symlog", "constant": limits[0], "zero": True} if limits else None
        values = [] if not limits else [sign * limits[0] * factor for factor in (1, 5, 20, 100) for sign in (1, -1)]
        axis = {"values": [0, *values], "format": ".3~r"} if values else None
        panels.append(Panel(words, curve_panel(series, runs, "step", "change, %", by="curve", scale=scale, axis=axis,
                                               more=threshold(marks) if marks else (), points=True)))
    caption = ("The change of a window relative to the one before. Algorithm 1 passes when the last changes of all "
               "families and of the loss lie between the dashed lines." if tests else
               "The change of a window relative to the one before. No phase ends by Algorithm 1.")
    return _curves("changes", title, caption, [*norms, *losses], panels, "change_percent")


def merges(run: Run, name: str, most: int) -> Made:
    title = "ReLoRA cycles"
    if not run.merges:
        return LeftOut(title, "The adapters were never merged during a phase.")
    series = collect([run], {"train/loss": "training loss"}, most)
    panels = [Panel("training loss, with a rule per merge", curve_panel(series, [run], "step", "training loss", more=[
        {"data": {"values": [{"step": event.step, "cycle": event.cycle} for event in run.merges]},
         "mark": {"type": "rule", "opacity": 0.35},
         "encoding": {"x": {"field": "step", "type": "quantitative"},
                      "tooltip": [{"field": what, "type": "quantitative"} for what in ("cycle", "step")]}}]))]
    for title_of_panel, column in (("change of the outputs at a merge", "merge output change"),
                                   ("share of the moments that was reset", "merge reset share")):
        found = collect([run], {column: title_of_panel}, most, 100)
        if found:
            panels.append(Panel(title_of_panel, curve_panel(found, [run], "step", "%", points=True)))
            series = [*series, *found]
    caption = f"{len(run.merges)} merges of the adapters into the weights (Figure 8 of PreLoRA)."
    return _curves(f"relora_cycles{name}", title, caption, series, panels, "value")


# ---- bars and maps

def phases(runs: Sequence[Run]) -> Made:
    title = "Epoch time, throughput and memory per phase"
    quantities: Sequence[tuple[str, str, Callable[[Run, Phase], float | None]]] = (
        ("epoch", "minutes per epoch", epoch_minutes),
        ("throughput", "images per second (median)", lambda _, phase: phase.median("img_s")),
        ("peak memory", "GiB resident, rank 0", lambda _, phase: phase.peaks.get("peak_gib")),
        ("peak memory of the device", "GiB, rank 0", lambda _, phase: phase.peaks.get("device_peak_gib")),
    )
    rows: list[tuple[Cell, ...]] = []
    panels = []
    for name, unit, value in quantities:
        found = [(phase.name, run.label, number) for run in runs for phase in run.phases
                 if (number := value(run, phase)) is not None]
        if found:
            panels.append(Panel(f"{name}, {unit}", grouped_bars(found, unit)))
            rows += [(label, phase, name, unit, number) for phase, label, number in found]
    if not panels:
        return LeftOut(title, "Neither step times nor memory were logged.")
    missing = "" if any("peak" in str(row[2]) for row in rows) else " The peak memory of the phases was not logged."
    table = Table(("run", "phase", "quantity", "unit", "value"), rows)
    alt = "; ".join(f"{name} of {label}, {phase}: {number:.4g} {unit}" for label, phase, name, unit, number in rows[:9])
    caption = f"Medians over the logged steps of a phase, waits for data included (Figure 7 of PreLoRA).{missing}"
    return Figure("phases", title, caption, panels, table, table, f"{alt}.")


def epoch_minutes(run: Run, phase: Phase) -> float | None:
    """The minutes of an epoch at the median step of ``phase``."""
    step_s, data_s = phase.median("step_s"), phase.median("data_s")
    if step_s is None or run.steps_per_epoch is None:
        return None
    return (step_s + (data_s or 0.0)) * run.steps_per_epoch / 60


def state_memory(run: Run, name: str, _: int) -> Made:
    title = "State memory per phase"
    sides = [(phase, side, values) for phase in run.phases
             for side, values in (("predicted", phase.predicted), ("measured", phase.measured)) if values is not None]
    if not sides:
        return LeftOut(title, "Bytes by owner were not logged.")
    largest = max(sum(values.get(owner, 0) for owner in ALL_OWNERS) for _, _, values in sides)
    unit, factor = ("GiB", 2**30) if largest > 2**29 else ("MiB", 2**20)
    rows = [(f"{phase.name}, {side}", owner, values[owner] / factor) for phase, side, values in sides
            for owner in ALL_OWNERS if values.get(owner)]
    table = Table(("phase", "owner", "bytes"), [(f"{phase.name}, {side}", owner, values[owner])
                                                for phase, side, values in sides for owner in ALL_OWNERS
                                                if owner in values])
    alt = "; ".join(f"{phase.name}, {side}: {sum(values.get(o, 0) for o in ALL_OWNERS) / factor:.4g} {unit}"
                    for phase, side, values in sides)
    caption = "Bytes of rank 0 by owner at the end of a backward pass, as predicted and as counted."
    return Figure(f"state_memory{name}", title, caption, [Panel(title, bars(rows, f"{unit} of rank 0"))], table, table,
                  f"{alt}.")


def ranks(run: Run, name: str, _: int) -> Made:
    title = "Ranks of the adapters"
    given = [(phase, *ranks) for phase in run.phases for ranks in phase.ranks]
    distinct = [last for before, last in zip([None, *given], given, strict=False)
                if before is None or before[2] != last[2]]
    if not distinct:
        return LeftOut(title, "No plan in the log has adapters with ranks.")
    shown = distinct if len(distinct) <= MOST_MAPS else [*distinct[: MOST_MAPS - 1], distinct[-1]]
    panels = [Panel(f"{phase.name}, from step {step}", layer_map(dict(ranks), "rank", "d"))
              for phase, step, ranks in shown]
    table = Table(("phase", "first_step", "family", "layer", "rank"), [
        (phase.name, step, family, layer, rank) for phase, step, ranks in distinct
        for (family, layer), rank in ranks.items()])
    alt = "; ".join(f"{phase.name}, from step {step}: {len(ranks)} adapters of ranks {min(ranks.values())} to "
                    f"{max(ranks.values())}, {mean(ranks.values()):.3g} on average" for phase, step, ranks in shown)
    caption = ("The rank of the adapter of each linear, with AdaLoRA the components that remain; rows are layers, "
               "columns are families.")
    if len(shown) < len(distinct):
        caption += f" Of {len(distinct)} changes, the first and the last are shown."
    return Figure(f"ranks{name}", title, caption, panels, table, _pivot(distinct[-1][2]), f"{alt}.")


def _pivot(values: Mapping[Linear, float]) -> Table:
    families = list(dict.fromkeys(family for family, _ in values))
    layers = sorted({layer for _, layer in values})
    return Table(("layer", *families), [(layer, *(values.get((family, layer)) for family in families))
                                        for layer in layers])


def active_adapters(run: Run, name: str, _: int) -> Made:
    title = "Adapters that train (DynaLoRA)"
    if not run.active:
        return LeftOut(title, "All adapters of a phase trained at the same time.")
    updates = (run.end.updates if run.end is not None else None) or run.active[-1].updates
    panels = []
    if updates:
        counts = {linear_of(run, path): float(steps) for path, steps in sorted(updates.items())}
        panels.append(Panel("steps in which an adapter trained", layer_map(counts, "steps", "d")))
    shares = _shares(run)
    families = list(dict.fromkeys(family for family, _ in shares))
    for family in families:
        cells = [(layer, first, last, share) for (of, layer), bins in shares.items() if of == family
                 for first, last, share in bins]
        panels.append(Panel(family, time_map(cells, "share")))
    rows = [(family, layer, first, last, share) for (family, layer), bins in shares.items()
            for first, last, share in bins]
    share_of_all = mean(row[4] for row in rows)
    numbers = _pivot({linear: mean(share for _, _, share in bins) for linear, bins in shares.items()})
    caption = (f"The share of steps in which an adapter trained, in up to {TIME_BINS} equal parts of the steps "
               "since the first choice.")
    return Figure(f"active_adapters{name}", title, caption, panels,
                  Table(("family", "layer", "first_step", "last_step", "share"), rows), numbers,
                  f"{len(run.active)} choices among {len(shares)} adapters; on average an adapter trained in "
                  f"{share_of_all:.0%} of the steps.")


def _shares(run: Run) -> dict[Linear, list[tuple[int, int, float]]]:
    """Linear -> (first step, last step, share of its steps in which its adapter trained) of each part of the run."""
    first = run.active[0].step
    last = max(run.steps, run.active[-1].step + 1)
    parts = min(TIME_BINS, last - first)
    width = (last - first) / parts
    steps: dict[Linear, list[float]] = {}
    paths = {path: linear_of(run, path) for event in run.active for path in event.adapters}
    for linear in sorted(paths.values()):
        steps[linear] = [0.0] * parts
    ends = [event.step for event in run.active[1:]] + [last]
    for event, end in zip(run.active, ends, strict=True):
        for part in range(int((event.step - first) / width), min(parts, int((end - first) / width) + 1)):
            overlap = min(end, first + (part + 1) * width) - max(event.step, first + part * width)
            for path in event.adapters if overlap > 0 else ():
                steps[paths[path]][part] += overlap / width
    return {linear: [(round(first + part * width) + 1, round(first + (part + 1) * width), min(share, 1.0))
                     for part, share in enumerate(shares)] for linear, shares in steps.items()}
