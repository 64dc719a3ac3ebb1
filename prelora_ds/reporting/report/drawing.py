"""Draw figures with vl-convert, which the extra `report` installs. It needs neither a browser nor a network."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from prelora_ds.reporting.report.figure import Figure

VEGA_LITE = "6.4"  # the version of vl-convert 1.9 whose schema the figures name
SCALE = 2.0  # pixels of a PNG per pixel of a page


def can_draw() -> bool:
    """Whether the extra `report` is installed."""
    return importlib.util.find_spec("vl_convert") is not None


def drawings(figure: Figure) -> Iterator[tuple[str, str | bytes]]:
    """Yield (suffix, content) of each file of ``figure``."""
    vl_convert = _vl_convert()
    svg = vl_convert.vegalite_to_svg(figure.for_file(), vl_version=VEGA_LITE)
    yield "svg", svg
    yield "png", vl_convert.svg_to_png(svg, scale=SCALE)
    yield "pdf", vl_convert.svg_to_pdf(svg)


@cache
def scripts() -> str:
    """The JavaScript of Vega, Vega-Lite and Vega-Embed in one piece, as ``vegaEmbed`` of the page."""
    return str(_vl_convert().javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE))


def embedded(value: Any) -> str:
    """``value`` as JSON that can stand in a script element."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _vl_convert() -> Any:
    import vl_convert

    return vl_convert
