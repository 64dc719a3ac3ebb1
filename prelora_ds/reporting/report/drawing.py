"""Draw figures with vl-convert, which the extra `report` installs. It needs neither a browser nor a network."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any

from prelora_ds.reporting.report.figure import Figure

SCALE = 1.6  # pixels of a PNG per pixel of a page, for figures of up to 4 panels; larger ones take a second to encode
VEGA_LITE = "6.4"  # the version of vl-convert 1.9 whose schema the figures name


def can_draw() -> bool:
    """Whether the extra `report` is installed."""
    return importlib.util.find_spec("vl_convert") is not None


def drawings(figures: Sequence[Figure]) -> Iterator[tuple[str, str | bytes]]:
    """Yield (name of the file, content) of svg, png and pdf of each figure.

    PNG and PDF are made from the SVG in a second process, because vl-convert 1.9 holds the interpreter's lock.
    """
    vl_convert = _vl_convert()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        prints = []
        for figure in figures:
            svg = vl_convert.vegalite_to_svg(figure.for_file(), vl_version=VEGA_LITE)
            yield f"{figure.name}.svg", svg
            prints.append(pool.submit(_prints, svg, SCALE if len(figure.panels) <= 4 else 1.0))
        for figure, made in zip(figures, prints, strict=True):
            png, pdf = made.result()
            yield f"{figure.name}.png", png
            yield f"{figure.name}.pdf", pdf


def _prints(svg: str, scale: float) -> tuple[bytes, bytes]:
    vl_convert = _vl_convert()
    return vl_convert.svg_to_png(svg, scale=scale), vl_convert.svg_to_pdf(svg)


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
