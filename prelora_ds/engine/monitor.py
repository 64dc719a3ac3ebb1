"""A wrapper of DeepSpeed's monitor, so that a failing disk does not end a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from deepspeed.monitor.monitor import MonitorMaster


class EnduringMonitor:
    """A monitor with what DeepSpeed 0.19 needs of one: ``enabled`` and ``write_events``.

    The first failure is reported once and disables the monitor, because TensorBoard's writer does
    not recover. Training continues.

    make: returns DeepSpeed's monitor.
    say: prints a line.
    """

    def __init__(self, make: Callable[[], MonitorMaster], say: Callable[[str], None]) -> None:
        self._say = say
        self._master = None
        _silence_the_writer()
        self._attempt(lambda: setattr(self, "_master", make()))

    _master: MonitorMaster | None

    @property
    def enabled(self) -> bool:
        """Whether events are still written."""
        return self._master is not None

    def write_events(self, events: Sequence[tuple[str, float, int]]) -> None:
        """Write ``events``, each (name, value, number of samples)."""
        master = self._master
        if master is not None:
            self._attempt(lambda: master.write_events(events))

    def close(self) -> None:
        """Flush and close TensorBoard's writer."""
        if self._master is not None:
            self._attempt(self._master.tb_monitor.summary_writer.close)

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as exc:  # TensorBoard's own errors, or TensorFlow's if it is installed
            self._master = None
            self._say(
                f"warning: TensorBoard's events cannot be written ({exc}); training continues"
            )


def _silence_the_writer() -> None:
    """Keep TensorBoard's writer thread from printing a traceback.

    The next call to the writer raises the error again, and that call reports it.
    """
    former = threading.excepthook
    if getattr(former, "silences_tensorboard", False):
        return

    def hook(args: Any) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            former(args)

    hook.silences_tensorboard = True  # type: ignore[attr-defined]  # the mark that is checked above
    threading.excepthook = hook
