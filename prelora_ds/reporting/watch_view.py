"""How `prelora watch` shows the status of runs: a page, a few lines, one line, or JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from rich.console import Console
from rich.live import Live
from rich.text import Text

from prelora_ds.console import size, stamped
from prelora_ds.reporting.columns import print_line
from prelora_ds.reporting.watch import RunWatch, Status
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import json_text

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-~=+*#"
PAGE = (80, 12)  # columns and lines; a smaller terminal gets the compact view
PLAIN_EVERY_S = 10.0
STATES = {
    "running": "running",
    "silent": "NO SIGN OF LIFE",
    "stopped": "not running",
    "finished": "finished",
    "missing": "no run here yet",
}


def watch(folders: Sequence[RunFolder], *, every_s: float, as_json: bool, console: Console | None = None) -> None:
    """Show the runs until all of them have finished: on a page of a terminal, otherwise in lines."""
    console = console or Console()
    watches = [RunWatch(folder) for folder in folders]
    if as_json:
        _print_changes(watches, every_s, lambda status: print(json_text(status.as_json()), flush=True))
    elif console.is_terminal and not console.is_dumb_terminal:
        _show_page(watches, every_s, console)
    else:
        _print_changes(watches, max(every_s, PLAIN_EVERY_S), lambda status: print(stamped(line(status)), flush=True))


def show_once(folders: Sequence[RunFolder], *, as_json: bool, console: Console | None = None) -> bool:
    """Print the status of the runs, and return whether each folder has a run."""
    console = console or Console()
    found = [RunWatch(folder).status() for folder in folders]
    for status in found:
        if as_json:
            print(json_text(status.as_json()))
        else:
            for each in page(status, unicode=_shows_blocks(console)):
                print_line(console, each)
    return all(status.state != "missing" for status in found)


def _show_page(watches: Sequence[RunWatch], every_s: float, console: Console) -> None:
    found: list[Status] = []
    with Live(console=console, screen=True, auto_refresh=False) as live:
        shown = None
        while not found or not _all_finished(found):
            found = [each.status() for each in watches]
            lines = list(_screen(found, console))
            if lines != shown:
                live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)
                shown = lines
            if not _all_finished(found):
                time.sleep(every_s)
    for status in found:  # the page is gone with the terminal's second screen
        print_line(console, line(status))


def _screen(found: Sequence[Status], console: Console) -> Iterator[str]:
    unicode = _shows_blocks(console)
    if len(found) > 1:
        yield from (line(status, console.width) for status in found)
    elif console.width < PAGE[0] or console.height < PAGE[1]:
        yield from compact(found[0], console.width)
    else:
        yield from page(found[0], unicode=unicode, width=console.width)


def _print_changes(watches: Sequence[RunWatch], every_s: float, show: Callable[[Status], None]) -> None:
    """Show each status that has another step or state than the one before."""
    shown: dict[str, tuple[object, ...]] = {}
    while True:
        found = [each.status() for each in watches]
        for status in found:
            key = status.state, status.phase, status.step
            if shown.get(status.run) != key:
                show(status)
                shown[status.run] = key
        if _all_finished(found):
            return
        time.sleep(every_s)


def _all_finished(found: Sequence[Status]) -> bool:
    return all(status.state == "finished" for status in found)


# ---- text

def page(status: Status, *, unicode: bool = True, width: int | None = None) -> Iterator[str]:
    """Yield the lines of a full page; what is not known is left out.

    width: of a terminal; None for lines of any length.
    """
    for text in _page(status, unicode=unicode, width=width):
        yield "".join(letter if letter.isprintable() else " " for letter in text)  # a log may hold escape codes


def _page(status: Status, *, unicode: bool, width: int | None) -> Iterator[str]:
    yield _head(status, width)
    if status.state == "missing":
        return
    yield f"phase   {status.phase}{_steps(status)}" + _unless_none("   epoch {:.1f}", status.epoch)
    if status.loss is not None:
        text = f"loss    {status.loss:.4f}" + _unless_none("   top-1 {:.2%}", status.acc1)
        text += _unless_none("   rate {:.3g}", status.lr)
        curve = sparkline(status.losses, min(40, (width or 2 * PAGE[0]) - len(text) - 2), unicode=unicode)
        yield f"{text}  {curve}"
    yield from _test_lines(status, width)
    if status.img_s is not None:
        text = f"speed   {status.img_s:,.0f} img/s"
        if status.full_img_s is not None:
            text += f", {status.img_s / status.full_img_s:.2f} times the first phase"
        yield text + _unless_none("   waiting for data {:.1%}", status.data_share)
    if status.bytes_measured is not None and status.bytes_predicted is not None:
        yield f"memory  {size(status.bytes_measured)} of states per rank (predicted {size(status.bytes_predicted)})"
    left = _left(status)
    if left:
        yield f"left    {left}"
    if status.reason is not None:
        yield f"why     {status.reason}"
    for problem in status.problems:
        yield f"note    {problem}"


def compact(status: Status, width: int | None = None) -> Iterator[str]:
    """Yield three short lines."""
    yield _head(status, width)
    yield f"{status.phase}{_steps(status)}" + _unless_none("  loss {:.4f}", status.loss)
    yield _left(status)


def line(status: Status, width: int | None = None) -> str:
    """Return one line; at a limited width the folder takes at most half of it."""
    head = _head(status, width and width // 2)
    if status.state == "missing":
        return head
    parts = [f"{head}: {status.phase}{_steps(status)}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.acc1 is not None:
        parts.append(f"top-1 {status.acc1:.2%}")
    if status.img_s is not None and status.state == "running":
        parts.append(f"{status.img_s:,.0f} img/s")
    if left := _left(status):
        parts.append(left)
    return "  ".join(parts)


def _head(status: Status, width: int | None = None) -> str:
    """The state and the folder, whose beginning is left out if the line would be longer than ``width``."""
    age = "" if status.heartbeat_s is None else f" (heartbeat {duration(status.heartbeat_s)} ago)"
    attempt = "" if status.attempt is None else f", attempt {status.attempt}"
    state = f"{STATES[status.state]}{age}{attempt}"
    room = len(status.run) if width is None else max(12, width - len(state) - 2)
    run = status.run if len(status.run) <= room else "..." + status.run[3 - room:]
    return f"{run}  {state}"


def _steps(status: Status) -> str:
    if status.total_steps is None:
        return f"  step {status.step:,}"
    return f"  step {status.step:,} of {status.total_steps:,} ({status.step / status.total_steps:.1%})"


def _wrapped(head: str, words: Sequence[str], width: int | None) -> Iterator[str]:
    """Yield ``words`` in lines of ``width``, the first of which begins with ``head``."""
    line = head
    for word in words:
        if width is not None and len(line) + len(word) > width and line.strip() != head.strip():
            yield line.rstrip()
            line = " " * len(head)
        line += f"{word}  "
    yield line.rstrip()


def _test_lines(status: Status, width: int | None) -> Iterator[str]:
    test = status.test
    if test is None:
        if status.ends_at is not None and status.state != "finished":
            yield f"until   step {status.ends_at:,}, at the observation that follows"
        elif status.verdict is not None:
            yield f"test    {status.verdict}"
        return
    if test.loss_change is not None:
        changes = [*((family, change, test.tau) for family, change in test.changes.items()),
                   ("loss", test.loss_change, test.zeta)]
        shown = [f"{what} {change:.2f}{'*' if change > limit else ''}" for what, change, limit in changes]
        yield from _wrapped("change  ", shown, width)
        yield f"limits  tau {test.tau:g} %, zeta {test.zeta:g} %   (* is above its limit)"
    following = "no further test in this run" if test.next_step is None else f"next test after step {test.next_step:,}"
    yield f"test    {test.held} of {test.needed} comparisons hold; {following}"


def _left(status: Status) -> str:
    if status.eta_s is None or status.total_steps is None:
        return ""
    text = f"{status.total_steps - status.step:,} steps, {duration(status.eta_s)}"
    if status.walltime_left_s is None:
        return text
    verdict = "enough" if status.walltime_left_s > status.eta_s else "another job will be needed"
    return f"{text}   walltime left {duration(max(0.0, status.walltime_left_s))}: {verdict}"


def duration(seconds: float) -> str:
    """Return ``seconds`` in the two largest units that are not zero: ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def sparkline(values: Sequence[float], width: int, *, unicode: bool = True) -> str:
    """Return a curve of ``values`` in at most ``width`` characters; each stands for the mean of equally many values."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    blocks = BLOCKS if unicode else ASCII_BLOCKS
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)


def _unless_none(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _shows_blocks(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")
