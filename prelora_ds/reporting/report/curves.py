"""Panels with curves over steps or hours: phases are bands, switches are rules, resumes are ticks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prelora_ds.reporting.report.curve import MOST_POINTS, Point
from prelora_ds.reporting.report.figure import COLORS, CURVES, DASHES, INK, SEQUENTIAL, Cell, Spec, Table, inline
from prelora_ds.reporting.report.run import Run

Axis = Literal["step", "hours"]
TITLES: Mapping[Axis, str] = {"step": "step", "hours": "hours of training"}
FEWEST_POINTS = 8
LABELS = 34  # pixels over a view for the labels of switches
NUMBERED = 2  # up to so many runs, each has labels of its own for its switches


@dataclass(frozen=True)
class Series:
    """One curve of a run: ``label`` names it among the curves of that run."""

    run: Run
    label: str
    points: Sequence[Point]


def collect(runs: Sequence[Run], columns: Mapping[str, str], most: int, factor: float = 1.0) -> list[Series]:
    """Return the curves of ``columns`` (column -> label) of all runs, times ``factor``.

    most: the number of points of all curves together, unless each would have fewer than `FEWEST_POINTS`.
    """
    found = [(run, label, run.curves[column]) for run in runs for column, label in columns.items()
             if column in run.curves]
    each = max(FEWEST_POINTS, min(MOST_POINTS, most // max(1, len(found))))
    return [Series(run, label, [point._replace(value=point.value * factor) for point in curve.points(each)])
            for run, label, curve in found]


def as_table(series: Sequence[Series], value: str) -> Table:
    """All points, one per row."""
    return Table(("run", "curve", "step", "hours", value),
                 [(s.run.label, s.label, p.step, p.hours, p.value) for s in series for p in s.points])


def in_numbers(series: Sequence[Series]) -> Table:
    """The first, the last, the lowest and the highest value of each curve."""
    rows: list[tuple[Cell, ...]] = []
    for s in series:
        low, high = min(s.points, key=lambda p: p.value), max(s.points, key=lambda p: p.value)
        rows.append((s.run.label, s.label, s.points[0].value, s.points[-1].value, low.value, low.step, high.value,
                     high.step))
    return Table(("run", "curve", "first", "last", "lowest", "at step", "highest", "at step"), rows)


def in_words(series: Sequence[Series]) -> str:
    """What the curves do, in a sentence; of many, only the first four."""
    parts = [f"{s.label} of {s.run.label} goes from {s.points[0].value:.4g} at step {s.points[0].step} to "
             f"{s.points[-1].value:.4g} at step {s.points[-1].step}" for s in series[:4]]
    more = f"; {len(series) - 4} more curves are in the table" if len(series) > 4 else ""
    return f"{'; '.join(parts)}{more}."


def curve_panel(series: Sequence[Series], runs: Sequence[Run], x: Axis, y_title: str, *, by: str = "run",
                scale: Mapping[str, Any] | None = None, axis: Mapping[str, Any] | None = None,
                more: Sequence[Spec] = (), points: bool = False) -> Spec:
    """A view of ``series``.

    by: what the color of a curve stands for: the ``run``, the ``curve``, or the ``layer`` (labels are numbers then).
        Several runs in one view of curves have dashes of their own.
    points: whether each point is marked as well, for curves with few of them.
    more: further layers, for example thresholds.
    """
    shown = [run for run in runs if any(s.run is run for s in series)]
    names = [run.label for run in shown]
    labels = list(dict.fromkeys(s.label for s in series))
    rows: list[tuple[Cell, ...]] = [
        (s.run.label, int(s.label) if by == "layer" else s.label, p.step if x == "step" else p.hours, p.value)
        for s in series for p in s.points]
    encoding: Spec = {
        "x": {"field": x, "type": "quantitative", "title": TITLES[x], "scale": {"nice": False, "zero": False}},
        "y": {"field": "value", "type": "quantitative", "title": y_title, "scale": {"zero": False, **(scale or {})},
              **({} if axis is None else {"axis": dict(axis)})},
    }
    colored: Spec = {}
    if by == "layer":
        colored = {"field": "curve", "type": "quantitative", "scale": SEQUENTIAL, "title": "layer",
                   "legend": {"type": "gradient", "orient": "right", "direction": "vertical", "gradientLength": 120,
                              "gradientThickness": 10, "format": "d", "tickMinStep": 1}}
        encoding["detail"] = {"field": "curve"}
    elif by == "curve" and len(labels) > 1:
        colored = {"field": "curve", "type": "nominal", "scale": color_scale(labels), "legend": over_view(labels)}
    elif len(names) > 1:
        colored = {"field": "run", "type": "nominal", "scale": color_scale(names), "legend": over_view(names)}
    if colored:
        encoding["color"] = colored
    if len(names) > 1 and (by == "curve" or len(names) > len(COLORS)):
        encoding["strokeDash"] = {"field": "run", "type": "nominal", "scale": _dash_scale(names, by),
                                  "legend": {**legend(names), "orient": "bottom"} if by == "curve" else None}
    mark: Spec = {"type": "line", "strokeWidth": 1.5, "clip": True}
    if not colored:
        mark["color"] = COLORS[0]
    if points:
        mark["point"] = {"size": 18, "filled": True} | ({} if colored else {"color": COLORS[0]})
    columns = ("run", "curve", x, "value")
    curves = {"name": CURVES, "mark": mark, "encoding": encoding}
    return {"data": inline(Table(columns, rows)), "layer": [*_phases(shown, x), curves, *more]}


def color_scale(names: Sequence[str]) -> Spec:
    """One of `COLORS` for each name, in their order; they repeat after six."""
    return {"domain": list(names), "range": [COLORS[i % len(COLORS)] for i in range(len(names))]}


def _dash_scale(names: Sequence[str], by: str) -> Spec:
    """A dash for each name; where colors tell runs apart as well, one for each round of colors."""
    per_dash = 1 if by == "curve" else len(COLORS)
    return {"domain": list(names), "range": [DASHES[i // per_dash % len(DASHES)] for i in range(len(names))]}


def legend(labels: Sequence[str], width: int = 330) -> Spec:
    """A legend that is about ``width`` pixels wide, so that a narrow page has room for it."""
    return {"title": None, "columns": max(1, min(len(labels), width // (7 * max(map(len, labels)) + 34)))}


def over_view(labels: Sequence[str]) -> Spec:
    """A `legend` over the labels of the switches."""
    return {**legend(labels), "offset": LABELS}


def _phases(runs: Sequence[Run], x: Axis) -> list[Spec]:
    """The phases of a single run as bands, the switches of all runs as rules, and their resumes as ticks."""
    layers: list[Spec] = []

    def at(run: Run, step: int) -> float:
        return step if x == "step" else run.hours_at(step)

    along = {"field": "at", "type": "quantitative", "title": TITLES[x]}
    if len(runs) == 1:
        [run] = runs
        bands = [{"at": at(run, max(phase.begins, run.first_step)), "end": at(run, phase.ends), "phase": phase.name}
                 for phase in run.phases[1::2] if phase.ends]
        if bands:
            layers.append({"data": {"values": bands}, "mark": {"type": "rect", "color": INK, "opacity": 0.07},
                           "encoding": {"x": along, "x2": {"field": "end"}}})
    rules = [{"at": at(run, phase.begins), "label": f"{phase.name} @ {phase.begins}", "run": run.label,
              "color": INK if len(runs) == 1 else COLORS[number % len(COLORS)], "last": phase is run.phases[-1]}
             for number, run in enumerate(runs) for phase in run.phases[1:]]
    tooltip = [{"field": "run", "type": "nominal"}, {"field": "label", "type": "nominal", "title": "phase"}]
    for color in dict.fromkeys(rule["color"] for rule in rules):
        layers.append({"data": {"values": [rule for rule in rules if rule["color"] == color]},
                       "mark": {"type": "rule", "strokeDash": [3, 3], "opacity": 0.8, "color": color},
                       "encoding": {"x": along, "tooltip": tooltip}})
    labels = rules if len(runs) <= NUMBERED else _common_labels(runs, at)
    layers += _labels(labels, along, max(float(at(run, run.steps)) for run in runs))
    resumes = [{"at": at(run, resume.step), "run": run.label} for run in runs for resume in run.resumes]
    if resumes:
        layers.append({"data": {"values": resumes},
                       "mark": {"type": "point", "shape": "triangle-up", "filled": True, "size": 50, "color": INK},
                       "encoding": {"x": along, "y": {"value": "height"},
                                    "tooltip": [{"field": "run", "type": "nominal", "title": "resumed run"},
                                                {"field": "at", "type": "quantitative", "title": TITLES[x]}]}})
    return layers


def _common_labels(runs: Sequence[Run], at: Callable[[Run, int], float]) -> list[Spec]:
    """One label per phase for many runs, with the range of steps at which it begins."""
    begins: dict[str, list[tuple[float, int]]] = {}
    for run in runs:
        for phase in run.phases[1:]:
            begins.setdefault(phase.name, []).append((at(run, phase.begins), phase.begins))
    labels = []
    for name, places in begins.items():
        steps = sorted({step for _, step in places})
        label = f"{name} @ {steps[0]}" if len(steps) == 1 else f"{name} @ {steps[0]} to {steps[-1]}"
        labels.append({"at": min(places)[0], "label": label, "color": INK, "last": name == list(begins)[-1]})
    return labels


def _labels(labels: Sequence[Spec], along: Spec, end: float) -> list[Spec]:
    """Texts over the view. That of a last phase begins at its place, the others end there, if they have room."""
    placed: dict[tuple[bool, int, str], list[Spec]] = {}
    for label in labels:
        share = label["at"] / end if end else 0.0
        before = share > 0.75 or (share > 0.2 and not label["last"])
        row = sum(len(others) for (side, *_), others in placed.items() if side == before) % 2
        placed.setdefault((before, row, label["color"]), []).append(label)
    return [{"data": {"values": texts},
             "mark": {"type": "text", "align": "right" if before else "left", "dx": -2 if before else 2,
                      "color": color},
             "encoding": {"x": along, "y": {"value": -7 - 13 * row}, "text": {"field": "label", "type": "nominal"}}}
            for (before, row, color), texts in placed.items()]


def threshold(values: Sequence[tuple[float, str]]) -> list[Spec]:
    """Horizontal lines at ``values``, each with a label."""
    rows = [{"value": value, "label": label} for value, label in values]
    y = {"field": "value", "type": "quantitative"}
    return [
        {"data": {"values": rows}, "mark": {"type": "rule", "strokeDash": [6, 4], "opacity": 0.7, "color": INK},
         "encoding": {"y": y}},
        {"data": {"values": rows}, "mark": {"type": "text", "align": "right", "baseline": "bottom", "dy": -2},
         "encoding": {"x": {"value": "width"}, "y": y, "text": {"field": "label", "type": "nominal"}}},
    ]
