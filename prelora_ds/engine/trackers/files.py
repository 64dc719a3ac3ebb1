"""Trackers that are files of the run: TensorBoard's events, and CSV."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prelora_ds.engine.trackers.base import Event, Tracker, deepspeed_monitor
from prelora_ds.files import replace_file


class TensorBoard(Tracker):
    """Event files in ``folder``."""

    what = "TensorBoard's events"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        _silence_the_writer()

    def open(self, after_samples: int) -> None:
        resumed = self._folder.is_dir()
        place = {"output_path": str(self._folder.parent), "job_name": self._folder.name}
        self._writer = deepspeed_monitor(tensorboard=place).tb_monitor.summary_writer
        if resumed:
            self.rewind(after_samples)

    def rewind(self, after_samples: int) -> None:
        # TensorBoard purges what follows when it reads this event. The event goes into the open file, since
        # TensorBoard reads files in the order of their names, which two files of one second may not keep.
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.event_pb2 import SessionLog

        start = Record(step=after_samples + 1, session_log=SessionLog(status=SessionLog.START))
        self._writer.file_writer.add_event(start)

    def write(self, events: Sequence[Event]) -> None:
        # As one record. DeepSpeed 0.19 writes one for each value, and waits because the writer's queue holds only ten.
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value, _ in events]
        *_, (_, _, samples) = events
        self._writer.file_writer.add_summary(Summary(value=values), samples)

    def end_step(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


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


class Csv(Tracker):
    """One file per metric in ``folder``, with the columns ``step`` (the number of samples) and the metric."""

    what = "the CSV files"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, after_samples: int) -> None:
        place = {"output_path": str(self._folder.parent), "job_name": self._folder.name}
        self._monitor = deepspeed_monitor(csv_monitor=place)
        # DeepSpeed 0.19 writes a header into every file that is not in this list.
        self._monitor.csv_monitor.filenames = [
            path.stem for path in sorted(self._folder.glob("*.csv")) if cut_csv(path, after_samples)
        ]

    def write(self, events: Sequence[Event]) -> None:
        self._monitor.write_events(events)

    def close(self) -> None:
        pass  # DeepSpeed closes each file after each row


def cut_csv(path: Path, after_samples: int) -> bool:
    """Remove the rows after ``after_samples`` and an unfinished last line; return whether a header is left."""
    lines = path.read_bytes().splitlines(keepends=True)
    header, rows = lines[:1], lines[1:]
    kept = header + [row for row in rows if row.endswith(b"\n") and int(row.split(b",")[0]) <= after_samples]
    if not header or not header[0].endswith(b"\n"):
        path.unlink()
        return False
    if kept != lines:
        replace_file(path, b"".join(kept), durable=False)
    return True
