"""What every tracker does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

Event = tuple[str, float, int]  # name, value, number of samples


class Tracker(ABC):
    """One place that metrics go to."""

    what: str  # as in "... cannot be written"

    @abstractmethod
    def open(self, after_samples: int) -> None:
        """Begin, or continue after ``after_samples``."""

    @abstractmethod
    def write(self, events: Sequence[Event]) -> None:
        """Write events of one step."""

    def end_step(self) -> None:  # noqa: B027
        """The step of the last events has no more events."""

    def rewind(self, after_samples: int) -> None:
        """Continue after ``after_samples`` in the same job."""
        self.close()
        self.open(after_samples)

    @abstractmethod
    def close(self) -> None:
        """Bring everything to its place."""


def deepspeed_monitor(**config: Any) -> Any:
    """Return DeepSpeed's ``MonitorMaster`` with one monitor. It can be made only once there is a process group."""
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    return MonitorMaster(get_monitor_config({key: {"enabled": True} | value for key, value in config.items()}))
