"""A table with one column per phase, which is printed in parts where the terminal is too narrow for all phases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Column = tuple[str, Sequence[str]]  # its head, and one cell per label


def print_columns(console: Console, labels: Sequence[str], columns: Sequence[Column]) -> None:
    """Print a table of ``columns``, with ``labels`` on the left of each part."""
    for part in _parts(console.width, labels, columns):
        table = Table("")
        for head, _ in part:
            table.add_column(escape(head), justify="right")
        for i, label in enumerate(labels):
            table.add_row(escape(label), *(escape(cells[i]) for _, cells in part))
        console.print(table)


def print_line(console: Console, text: str) -> None:
    """Print a line as it is, without markup or colors; a terminal wraps it, a file gets it in one piece."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _parts(width: int, labels: Sequence[str], columns: Sequence[Column]) -> Iterator[list[Column]]:
    """Yield as many columns per part as fit, but at least one."""
    label_width = max(map(len, labels)) + 4  # with the borders of the table
    part: list[Column] = []
    used = label_width
    for head, cells in columns:
        needed = max(len(head), *map(len, cells)) + 3
        if part and used + needed > width:
            yield part
            part, used = [], label_width
        part.append((head, cells))
        used += needed
    yield part
