"""Write the folder of a report, completely or not at all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prelora_ds.errors import ConfigError, cannot_write
from prelora_ds.files import new_folder
from prelora_ds.reporting.history import find_logs
from prelora_ds.reporting.report.drawing import can_draw, drawings
from prelora_ds.reporting.report.figure import Figure
from prelora_ds.reporting.report.figures import LeftOut, all_figures
from prelora_ds.reporting.report.markdown import markdown
from prelora_ds.reporting.report.page import MOST_BYTES, page
from prelora_ds.reporting.report.reading import read_run
from prelora_ds.reporting.report.run import Run
from prelora_ds.reporting.report.summary import summary
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import json_text

POINTS = (6000, 3000, 1500, 750, 300)  # of a figure; fewer if the page would be too large


def write_report(folders: Sequence[RunFolder], out: Path) -> list[str]:
    """Write the report of the runs in ``folders`` to the new folder ``out``.

    Returns what to tell the user. Raises ConfigError, before anything is written, for folders without a run and for
    an ``out`` that is in use or inside a run.
    """
    out = out.absolute()
    for run_folder in folders:
        find_logs(run_folder)
    _check(folders, out)
    runs = _read(folders)
    result = summary(runs)
    drawn = can_draw()
    figures, left_out, html = _fitting(runs, result, drawn)
    result["figures"] = [{"name": figure.name, "title": figure.title, "data": f"data/{figure.name}.csv",
                          "files": [f"figures/{figure.name}.{kind}" for kind in ("png", "svg", "pdf") if drawn]}
                         for figure in figures]
    result["left_out"] = [{"title": figure.title, "why": figure.why} for figure in left_out]
    try:
        with new_folder(out, replace=False) as folder:
            (folder / "data").mkdir()
            for figure in figures:
                (folder / f"data/{figure.name}.csv").write_bytes(_encoded(figure.data.csv()))
            if html is not None:
                (folder / "index.html").write_bytes(_encoded(html))
                (folder / "figures").mkdir()
                for name, content in drawings(figures):
                    (folder / "figures" / name).write_bytes(_encoded(content) if isinstance(content, str) else content)
            (folder / "report.json").write_bytes(_encoded(json_text(result, indent=2) + "\n"))
            (folder / "report.md").write_bytes(_encoded(markdown(result, figures, left_out, drawn=drawn)))
    except OSError as exc:
        raise cannot_write("--out", out, exc) from exc
    return list(_told(out, figures, result["notes"], drawn))


def summarized(folders: Sequence[RunFolder]) -> dict[str, Any]:
    """Return the content of report.json without its figures. Raises ConfigError for folders without a run."""
    return summary(_read(folders))


def _read(folders: Sequence[RunFolder]) -> list[Run]:
    twice = [path for path, count in Counter(folder.path.resolve() for folder in folders).items() if count > 1]
    if twice:
        raise ConfigError("RUN", str(twice[0]), "is named twice", "name each run once")
    return [read_run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def _check(folders: Sequence[RunFolder], out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError("--out", str(out), "exists and is not a folder", "name a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError("--out", str(out), "exists and is not empty", "name a new folder, or remove this one")
    target = out.resolve()
    inside = [path for path in (target, *target.parents)
              if any(path == folder.path.resolve() for folder in folders) or os.path.isfile(RunFolder(path).metrics)]
    if inside:
        raise ConfigError("--out", str(out), f"is inside the run {inside[0]}", "name a folder outside of every run")


def _labels(folders: Sequence[RunFolder]) -> list[str]:
    """The names of the folders, with as much of their paths as tells them apart."""
    paths = [folder.path.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return [label.encode(errors="replace").decode() for label in labels]
    raise AssertionError("different paths have different parts")


def _fitting(runs: Sequence[Run], result: dict[str, object], drawn: bool
             ) -> tuple[list[Figure], list[LeftOut], str | None]:
    """The figures, those left out, and the page, with as many points as the page has room for."""
    html = None
    for most in POINTS:
        made = list(all_figures(runs, most))
        figures = [figure for figure in made if isinstance(figure, Figure)]
        left_out = [figure for figure in made if isinstance(figure, LeftOut)]
        if not drawn:
            break
        html = page(result, figures, left_out)
        if len(html.encode(errors="replace")) <= MOST_BYTES:
            break
    return figures, left_out, html


def _encoded(text: str) -> bytes:
    """``text`` as UTF-8; a log may hold surrogates, which have no UTF-8."""
    return text.encode(errors="replace")


def _told(out: Path, figures: Sequence[Figure], notes: Sequence[str], drawn: bool) -> list[str]:
    told = [f"note: {note}" for note in notes]
    if drawn:
        return [*told, f"{out}: index.html, report.md, report.json and {len(figures)} figures"]
    return [*told, f"{out}: report.md, report.json and the data of {len(figures)} figures",
            "For the page and the figures as well, install the extra: pip install 'prelora_ds[report]'"]
