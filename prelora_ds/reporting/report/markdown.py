"""The report as Markdown, short enough for a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prelora_ds.reporting.report.figure import Figure
from prelora_ds.reporting.report.figures import LeftOut
from prelora_ds.reporting.report.summary import NOT_LOGGED, card, finals_table, phases_table

MOST_LINES = 80


def markdown(result: dict[str, Any], figures: Sequence[Figure], left_out: Sequence[LeftOut], *, drawn: bool) -> str:
    """Return the text of report.md, of at most `MOST_LINES` lines. drawn: whether the figures exist as files."""
    runs = result["runs"]
    sections: list[list[str]] = [
        [f"# {_plain(', '.join(run['run'] for run in runs))}", ""],
        [*(f"- **{_plain(run['run'])}**: {_plain(run['verdict'])}" for run in runs), ""],
        ["## Finals", "", *_table(*finals_table(result)), ""],
        [*_phases(runs), ""],
        ["## Not run", "", *(f"- {_plain(run['run'])}: {_plain(sentence)}" for run in runs for sentence in
                             run["not_run"]), ""],
        ["## Incidents", "", *_incidents(runs), ""],
        ["## Origin", "", *_origin(runs), ""],
        [*_figures(figures, left_out, drawn)],
    ]
    lines = [line for section, most in zip(sections, _shares([len(s) for s in sections]), strict=True)
             for line in _cut(section, most)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _shares(lengths: Sequence[int]) -> list[int]:
    """How many lines each section may have: all of them, unless the whole is too long; then the longest are cut."""
    shares = list(lengths)
    while sum(shares) > MOST_LINES:
        shares[shares.index(max(shares))] -= 1
    return shares


def _cut(lines: list[str], most: int) -> list[str]:
    if len(lines) <= most:
        return lines
    kept = lines[: most - 2]
    return [*kept, "" if kept[-1].startswith("|") else f"- {len(lines) - most + 1} more are in report.json",
            *([f"{len(lines) - most + 1} more are in report.json"] if kept[-1].startswith("|") else [""])]


def _plain(text: str) -> str:
    """``text`` on one line, without what Markdown would take for a cell or for HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(map(_plain, head))} |"
    yield f"|---|{'---:|' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(map(_plain, row))} |"


def _phases(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from ("## Phases", "")
    tables = [phases_table(run) for run in runs]
    if len(runs) == 1:
        yield from _table(*tables[0])
    else:
        yield from _table(["run", *tables[0][0]], [
            [run["run"], *row] for run, (_, rows) in zip(runs, tables, strict=True) for row in rows])


def _incidents(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    found = [f"- {_plain(run['run'])}: {_plain(sentence)}" for run in runs for sentence in run["incidents"]]
    yield from found or ["No resume, no slow rank and no unreadable sample was logged."]


def _origin(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    for run in runs:
        rows = dict(card(run))
        texts = [f"{label}: {_plain(rows[label])}" for label in
                 ("samples", "hours of training", "hosts × ranks", "command", "commit", "versions", "config hash")]
        yield f"- {_plain(run['run'])}: {'; '.join(text for text in texts if not text.endswith(NOT_LOGGED))}"
        missing = [label for label in ("command", "commit", "versions") if rows[label] == NOT_LOGGED]
        if missing:
            yield f"- {_plain(run['run'])}: {', '.join(missing)} {NOT_LOGGED}"


def _figures(figures: Sequence[Figure], left_out: Sequence[LeftOut], drawn: bool) -> Iterator[str]:
    yield from ("## Figures", "")
    where = "figures/NAME.{png,svg,pdf} and data/NAME.csv" if drawn else "data/NAME.csv (the figures were not drawn)"
    names = ", ".join(f"`{figure.name}`" for figure in figures)
    yield f"{where}, for NAME in {names}."
    if left_out:
        yield ""
        yield f"Left out: {'; '.join(f'{figure.title} ({figure.why[:-1]})' for figure in left_out)}."
