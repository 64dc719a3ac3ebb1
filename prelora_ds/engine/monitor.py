"""DeepSpeed's monitor in a form whose disk may fail without ending a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from deepspeed.monitor.monitor import MonitorMaster


class EnduringMonitor:
    """What DeepSpeed 0.19 asks of a monitor: ``enabled`` and ``write_events``.

    The first failure is said once and ends the monitor: TensorBoard's writer does not recover.
    Training continues.

    make: returns DeepSpeed's monitor. say: prints a line.
    """

    def __init__(self, make: Callable[[], MonitorMaster], say: Callable[[str], None]) -> None:
        self._say, self._master = say, None
        _silence_the_writer()
        self._attempt(lambda: setattr(self, "_master", make()))

    _master: MonitorMaster | None

    @property
    def enabled(self) -> bool:
        return self._master is not None

    def write_events(self, events: Sequence[tuple[str, float, int]]) -> None:
        """``events``: (name, value, samples)."""
        master = self._master
        if master is not None:
            self._attempt(lambda: master.write_events(events))

    def close(self) -> None:
        if self._master is not None:
            self._attempt(self._master.tb_monitor.summary_writer.close)

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as exc:  # of TensorBoard's own, and TensorFlow's where that is installed
            self._master = None
            self._say(
                f"warning: TensorBoard's events cannot be written ({exc}); training continues"
            )


def _silence_the_writer() -> None:
    """Keep the thread in which TensorBoard writes from printing a traceback.

    Its error is raised again by the next call to the writer, and said there.
    """
    former = threading.excepthook
    if getattr(former, "silences_tensorboard", False):
        return

    def hook(args: Any) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            former(args)

    hook.silences_tensorboard = True  # type: ignore[attr-defined]  # the mark that is looked for above
    threading.excepthook = hook
