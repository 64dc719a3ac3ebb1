"""The page of a report: one HTML file with everything in it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2

from prelora_ds.reporting.report.drawing import embedded, scripts
from prelora_ds.reporting.report.figure import Cell, Figure
from prelora_ds.reporting.report.figures import LeftOut
from prelora_ds.reporting.report.summary import card, cell_text, finals_table, phases_table

MOST_BYTES = 3_000_000  # it can be attached to a mail, and opens on a phone
MOST_ROWS = 150  # of a table of numbers


def page(result: dict[str, Any], figures: Sequence[Figure], left_out: Sequence[LeftOut]) -> str:
    """Return the HTML of a report. result: its `summary`."""
    template = resources.files("prelora_ds.reporting.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    specs = {f"view_{figure.name}_{i}": spec for figure in figures for i, spec in enumerate(figure.for_page())}
    names = ", ".join(run["run"] for run in result["runs"])
    return environment.from_string(template).render(
        title=f"{names}: training report", result=result, figures=figures, left_out=left_out, card=card, cells=_cells,
        finals_table=finals_table, phases_table=phases_table, most_rows=MOST_ROWS, specs=embedded(specs),
        scripts=scripts().replace("</script", "<\\/script"))


def _cells(rows: Sequence[Sequence[Cell]]) -> list[list[str]]:
    return [[cell_text(cell) for cell in row] for row in rows[:MOST_ROWS]]
