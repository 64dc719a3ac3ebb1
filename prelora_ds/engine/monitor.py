"""The trackers of a run as one monitor of DeepSpeed, none of which can end the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prelora_ds.engine.trackers import Event, Tracker


class EnduringMonitor:
    """All trackers of a run, with what DeepSpeed 0.19 needs of a monitor: ``enabled`` and ``write_events``.

    The first failure of a tracker is reported once and ends this tracker: TensorBoard's writer, for
    example, does not recover. The other trackers and the training continue.

    after_samples: where a resumed run continues.
    say: prints a line.
    """

    def __init__(self, trackers: Iterable[Tracker], after_samples: int, say: Callable[[str], None]) -> None:
        self._say = say
        self._working = list(trackers)
        self._each(lambda tracker: tracker.open(after_samples))

    @property
    def enabled(self) -> bool:
        """Whether any tracker still works."""
        return bool(self._working)

    def write_events(self, events: Sequence[Event]) -> None:
        """Write events of a step. They reach their files with the next row."""
        self._each(lambda tracker: tracker.write(events))

    def write_row(self, events: Sequence[Event]) -> None:
        """Write the row of a step, after which the step has no more events."""
        self.write_events(events)
        self._each(lambda tracker: tracker.end_step())

    def rewind(self, after_samples: int) -> None:
        """Continue after ``after_samples``, from which the run goes on after a rollback."""
        self._each(lambda tracker: tracker.rewind(after_samples))

    def close(self) -> None:
        """Bring everything to its place, and end. Only the first call has an effect."""
        self._each(lambda tracker: tracker.close())
        self._working = []

    def _each(self, act: Callable[[Tracker], object]) -> None:
        for tracker in tuple(self._working):
            try:
                act(tracker)
            except Exception as exc:  # every tracker has errors of its own
                self._working.remove(tracker)
                self._say(f"warning: {tracker.what} cannot be written ({exc}); training continues")
