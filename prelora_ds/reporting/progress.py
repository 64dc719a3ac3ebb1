"""Progress on rank 0: a bar on a terminal, lines with the time elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from prelora_ds.console import stamped

PLAIN_EVERY_S = 10.0


class TrainProgress:
    """Shows the step, phase, loss, images per second and remaining time of a run.

    total: steps of the run, of which ``done`` are done already. shown: False on all ranks but one.
    """

    def __init__(self, total: int, *, shown: bool, done: int = 0) -> None:
        self._total = total
        self._done = done
        self._shown = shown
        self._begun = time.monotonic()
        self._last_line = float("-inf")
        self._bar: Progress | None = None
        if shown and sys.stdout.isatty():
            self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
                                 TimeRemainingColumn(), console=Console())
            self._task = self._bar.add_task("starting", total=total, completed=done)
            self._bar.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """Show a logged row (`RunLog.metrics`)."""
        if not self._shown:
            return
        text = f"{row['phase']:<6} "
        text += f"loss {row['train/loss']:.4f}  {row['img_s']:.3g} img/s" if "img_s" in row else "update skipped"
        if "val/acc1" in row:
            text += f"  acc1 {row['val/acc1']:.2%}"

        step = row["step"]
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._last_line >= PLAIN_EVERY_S or step == self._total:
            self._last_line = now
            eta = (now - self._begun) / max(1, step - self._done) * (self._total - step)
            print(stamped(f"step {step}/{self._total}  epoch {row['epoch']:.1f}  {text}  ETA {eta:.0f} s"), flush=True)

    def say(self, text: str) -> None:
        """Print a line, with the time."""
        if self._bar is not None:
            self._bar.console.print(stamped(text), highlight=False, markup=False, soft_wrap=True)
        elif self._shown:
            print(stamped(text), flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class CountProgress:
    """Shows on stderr how many ``things`` are done: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, things: str, *, shown: bool) -> None:
        self._things = things
        self._shown = shown
        self._last_line = float("-inf")
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if shown and self._console.is_terminal:
            self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(),
                                 TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn(),
                                 console=self._console, transient=True)
            self._task = self._bar.add_task(things, total=None)

    def __enter__(self) -> CountProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, total: int) -> None:
        """Show ``done`` of ``total``. Items done before the first call are excluded from the remaining time."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif self._shown and now - self._last_line >= PLAIN_EVERY_S:
            self._last_line = now
            print(f"{done}/{total} {self._things}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line."""
        if self._shown:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
