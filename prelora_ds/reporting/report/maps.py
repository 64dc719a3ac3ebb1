"""Panels that are no curves: bars per phase, and maps of layers and families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prelora_ds.reporting.report.curves import TITLES, color_scale, legend
from prelora_ds.reporting.report.figure import COLORS, INK, ROW_HEIGHT, SEQUENTIAL, Cell, Spec, Table, inline

LOW_ROW_HEIGHT = 12  # pixels of a row of a map without numbers
BAR_HEIGHT = 22


def bars(rows: Sequence[tuple[str, str, float]], title: str) -> Spec:
    """Horizontal bars. rows: (label on the left, what the color stands for, value)."""
    labels = list(dict.fromkeys(label for label, _, _ in rows))
    colors = list(dict.fromkeys(kind for _, kind, _ in rows))
    encoding: Spec = {
        "y": {"field": "label", "type": "nominal", "sort": labels, "title": None,
              "axis": {"labelLimit": 140, "domain": False, "ticks": False}},
        "x": {"field": "value", "type": "quantitative", "title": title, "axis": {"tickCount": 5}},
        "tooltip": [{"field": name, "type": "nominal"} for name in ("label", "kind", "value")],
    }
    if len(colors) > 1:
        encoding["color"] = {"field": "kind", "type": "nominal", "scale": color_scale(colors),
                             "legend": {**legend(colors, 220), "symbolType": "square"}}
    mark: Spec = {"type": "bar"} | ({} if len(colors) > 1 else {"color": COLORS[0]})
    return {"height": BAR_HEIGHT * len(labels), "data": inline(Table(("label", "kind", "value"), rows)), "mark": mark,
            "encoding": encoding}


def grouped_bars(rows: Sequence[tuple[str, str, float]], title: str) -> Spec:
    """`bars`, with the bars of one label next to each other instead of one after the other."""
    spec = bars(rows, title)
    if "color" in spec["encoding"]:
        kinds = spec["encoding"]["color"]["scale"]["domain"]
        spec["encoding"]["yOffset"] = {"field": "kind", "type": "nominal", "scale": {"domain": kinds}}
        labels = spec["encoding"]["y"]["sort"]
        spec["height"] = (BAR_HEIGHT * 2 // 3 * len(kinds) + 8) * len(labels)
    return spec


def layer_map(values: Mapping[tuple[str, int], float], title: str, form: str) -> Spec:
    """A map of layers (rows) and families (columns), with each number in its cell. form: of d3-format."""
    families = list(dict.fromkeys(family for family, _ in values))
    middle = (min(values.values()) + max(values.values())) / 2
    data = Table(("family", "layer", "value"), [(family, layer, value) for (family, layer), value in values.items()])
    x = {"field": "family", "type": "nominal", "sort": families, "title": None,
         "axis": {"orient": "top", "labelAngle": 0, "domain": False, "ticks": False}}
    y = {"field": "layer", "type": "ordinal", "title": "layer", "axis": {"domain": False, "ticks": False}}
    color = {"field": "value", "type": "quantitative", "scale": SEQUENTIAL, "legend": None}
    tooltip = [{"field": name, "type": "nominal"} for name in ("family", "layer")] + [
        {"field": "value", "type": "quantitative", "title": title, "format": form}]
    return {"height": ROW_HEIGHT * len({layer for _, layer in values}), "data": inline(data), "layer": [
        {"mark": {"type": "rect"}, "encoding": {"x": x, "y": y, "color": color, "tooltip": tooltip}},
        {"mark": {"type": "text"},
         "encoding": {"x": x, "y": y, "text": {"field": "value", "type": "quantitative", "format": form},
                      "color": {"condition": {"test": f"datum.value > {middle}", "value": "black"}, "value": "white"}}},
    ]}


def time_map(cells: Sequence[tuple[int, int, int, float]], title: str) -> Spec:
    """A map of layers (rows) over steps. cells: (layer, first step, last step, share)."""
    rows: list[tuple[Cell, ...]] = list(cells)
    encoding: Spec = {
        "x": {"field": "first", "type": "quantitative", "title": TITLES["step"],
              "scale": {"nice": False, "zero": False}},
        "x2": {"field": "last"},
        "y": {"field": "layer", "type": "ordinal", "title": "layer", "axis": {"labelOverlap": True}},
        "color": {"field": "share", "type": "quantitative", "scale": {**SEQUENTIAL, "domain": [0, 1]}, "title": title,
                  "legend": {"orient": "top", "gradientLength": 100, "gradientThickness": 10, "format": "%"}},
        "tooltip": [{"field": name, "type": "quantitative"} for name in ("layer", "first", "last", "share")],
    }
    layers = {layer for layer, *_ in cells}
    return {"height": LOW_ROW_HEIGHT * len(layers), "data": inline(Table(("layer", "first", "last", "share"), rows)),
            "mark": {"type": "rect", "stroke": INK, "strokeOpacity": 0.1}, "encoding": encoding}
