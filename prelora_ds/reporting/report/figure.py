"""What a figure consists of: panels in Vega-Lite, the data behind them, and its content in words and numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Cell = str | int | float | None
Spec = dict[str, Any]

WIDTH = 620  # pixels of a figure with one panel, in a file
PANEL_WIDTH = 300
HEIGHT = 260
PANEL_HEIGHT = 190
ROW_HEIGHT = 18  # of a map
INK = "currentColor"  # a page gives it its own color, a file is black
FONT = "system-ui, 'Helvetica Neue', Arial, sans-serif"

# Okabe and Ito's colors, which color-blind readers can tell apart, without black and without yellow, which is invisible
# on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ([1, 0], [7, 3], [2, 2], [9, 3, 2, 3], [1, 4])
SEQUENTIAL = {"scheme": {"name": "viridis", "extent": [0.15, 0.95]}}

CONFIG: Spec = {
    "background": "transparent",
    "font": FONT,
    "view": {"stroke": None},
    "axis": {"labelColor": INK, "titleColor": INK, "domainColor": INK, "tickColor": INK, "gridColor": INK,
             "gridOpacity": 0.12, "domainOpacity": 0.4, "tickOpacity": 0.4, "labelFontSize": 12, "labelSeparation": 8,
             "titleFontSize": 12, "titleFontWeight": "normal"},
    "legend": {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12, "orient": "top",
               "titleFontWeight": "normal", "symbolType": "stroke", "symbolStrokeWidth": 3, "symbolSize": 200,
               "labelLimit": 300},
    "title": {"color": INK, "fontSize": 13, "fontWeight": "bold", "anchor": "start"},
    "text": {"fontSize": 11, "color": INK},
    "range": {"category": list(COLORS)},
}


@dataclass(frozen=True)
class Table:
    """Rows of numbers and texts, with named columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def csv(self, digits: int | None = None) -> str:
        """Return the table as CSV: exactly, or with each float rounded to a number of significant digits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([short(cell, digits) for cell in row] for row in self.rows)
        return text.getvalue()


def short(cell: Cell, digits: int | None = 5) -> Cell:
    """A float with so many significant digits; anything else as it is."""
    return float(f"{cell:.{digits}g}") if isinstance(cell, float) and digits is not None else cell


@dataclass(frozen=True)
class Panel:
    """A view of Vega-Lite without width and config, so that the same one fits into a page and into a file."""

    title: str
    spec: Spec


@dataclass(frozen=True)
class Figure:
    """name: of its files. alt: what it shows, in a sentence. numbers: the table that a reader gets in its place."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    data: Table
    numbers: Table
    alt: str

    def for_file(self) -> Spec:
        """The figure as one drawing, with fixed sizes."""
        top = {**SCHEMA, "config": CONFIG, "background": "white"}
        if len(self.panels) == 1:
            return {**top, "width": WIDTH, "height": HEIGHT, **self.panels[0].spec}
        views = [{"title": panel.title, "width": PANEL_WIDTH, "height": PANEL_HEIGHT, **_without_names(panel.spec)}
                 for panel in self.panels]
        resolve = {"scale": {"color": "independent"}}
        return {**top, "columns": 3 if len(views) > 4 else 2, "concat": views, "resolve": resolve}

    def for_page(self) -> list[Spec]:
        """One view per panel, as wide as its place in the page, with values at the pointer."""
        height = HEIGHT if len(self.panels) == 1 else PANEL_HEIGHT
        fit = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
        return [{**SCHEMA, "config": CONFIG, "height": height, **fit, **_with_values(panel.spec)}
                for panel in self.panels]


SCHEMA = {"$schema": "https://vega.github.io/schema/vega-lite/v6.json"}
CURVES = "curves"  # the name of the layer with the curves
POINTS_WITH_VALUES = 250  # of a panel; more would make a page slow


def inline(table: Table) -> Spec:
    """``table`` as the data of a view: as CSV, because JSON would repeat the names of columns in each row."""
    sample = {name: next((row[i] for row in table.rows if row[i] is not None), None)
              for i, name in enumerate(table.columns)}
    parse = {name: "string" if isinstance(value, str) else "number" for name, value in sample.items()}
    return {"values": table.csv(5), "format": {"type": "csv", "parse": parse}}


def _without_names(spec: Spec) -> Spec:
    """``spec`` for a drawing of several views, in which layers of one name would all show the data of the last one."""
    if "layer" not in spec:
        return spec
    layers = [{key: value for key, value in layer.items() if key != "name"} for layer in spec["layer"]]
    return {**spec, "layer": layers}


def _with_values(spec: Spec) -> Spec:
    """Add the values at the pointer to a view with curves, and let its legend hide curves."""
    curves = next((layer for layer in spec.get("layer", []) if layer.get("name") == CURVES), None)
    if curves is None:
        return spec
    encoding = curves["encoding"]
    fields = [encoding[channel]["field"] for channel in ("color", "strokeDash") if channel in encoding]
    hover = {
        "transform": [{"sample": POINTS_WITH_VALUES}],
        "params": [{"name": "nearest", "select": {"type": "point", "nearest": True, "on": "pointerover",
                                                  "clear": "pointerout"}}],
        "mark": {"type": "point", "size": 60, "color": INK},
        "encoding": {
            "x": encoding["x"], "y": encoding["y"],
            "opacity": {"condition": {"param": "nearest", "empty": False, "value": 1}, "value": 0},
            "tooltip": [{"field": field, "type": "nominal"} for field in fields] + [
                {"field": encoding[axis]["field"], "type": "quantitative", "format": ",.5~g",
                 "title": encoding[axis].get("title", encoding[axis]["field"])} for axis in ("x", "y")],
        },
    }
    layers = []
    for layer in spec["layer"]:
        if layer is curves and fields and encoding[("color" if "color" in encoding else "strokeDash")]["type"] != \
                "quantitative":
            layer = {**layer,
                     "params": [{"name": "shown", "select": {"type": "point", "fields": fields[:1]}, "bind": "legend"}],
                     "encoding": {**encoding, "opacity": {"condition": {"param": "shown", "value": 1}, "value": 0.08}}}
        layers.append(layer)
    return {**spec, "layer": [*layers, hover]}
