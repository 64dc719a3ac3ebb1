"""The logs of a run, with one JSON object per line, and its meters."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from prelora_ds.core.codec import to_json
from prelora_ds.core.spectra import Spectra
from prelora_ds.core.switch_tests.prelora import Observation
from prelora_ds.errors import ConfigError
from prelora_ds.files import replace_file, sync_folder
from prelora_ds.run.folder import RunFolder


class EventKind(StrEnum):
    """The kind of an event: the value of the key ``event`` in its row."""

    PLAN = "plan"  # a plan that begins after ``step``, its reason, and the cost of the switch to it
    WAIT = "wait"  # a phase is over, but the next one waits for windows
    BYTES = "bytes"  # predicted and measured bytes under a plan
    JOB = "job"  # a job takes over: its command, commit, versions, hosts and number of ranks
    RESUME = "resume"  # the run continues from a checkpoint
    FORK = "fork"  # the controller's state with which a fork begins
    STRAGGLER = "straggler"  # a rank slows down the others, or does so no longer
    MERGE = "merge"  # adapters were merged into the weights and began again
    ACTIVE = "active"  # other adapters train from this step on
    PRUNED = "pruned"  # how many components of each adapter remain (AdaLoRA)
    BASE = "base"  # how much the outputs changed when the type of the frozen weights did
    ACCURACY = "accuracy"  # the accuracy of the model on quantised weights, and on their fp32 values
    END = "end"  # the run has finished


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Encode ``value`` as strict JSON; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class JsonLines:
    """A file with one JSON object per line.

    Each line is passed to the operating system before `write` returns. It is a side channel: what
    cannot be written is lost, and training continues. A row survives the death of the process. `sync_logs` brings the
    rows to the disk, where they survive a power loss too. That is not done for each row, because training would wait.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        # The first `write` tries again and reports the error.
        with contextlib.suppress(OSError):
            self._open()

    def write(self, row: Mapping[str, Any]) -> str | None:
        """Append ``row`` completely or not at all.

        Returns a description of what was lost and why, or None if nothing was lost.
        """
        lost = None
        try:
            if self._descriptor >= 0 and not self._in_place():
                self.close()
                lost = "was removed or replaced; its earlier rows are lost"
            self._open()
            self._append((json_text(row) + "\n").encode())
        except OSError as exc:
            return f"cannot be written ({exc.strerror})"
        return lost

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        if self._descriptor < 0:
            # Do not block: the path may be a pipe that nobody reads.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
            self._descriptor = os.open(self._path, flags, 0o644)

    def _in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _append(self, data: bytes) -> None:
        size = os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data):]
        except OSError:
            with contextlib.suppress(OSError):  # A pipe or a device has no size.
                os.ftruncate(self._descriptor, size)
            raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON-lines file.

    An unfinished last line, left by a kill or a power cut, is skipped. Raises ConfigError if the
    file cannot be read, or if a line is not a JSON object; the error then names the line.
    """
    return [row for _, row in stream_lines(path)]


def stream_lines(
    path: Path, pass_by: Callable[[ConfigError], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number of the line, row) of a JSON-lines file, as `read_lines` reads it.

    pass_by: is called with the error of each damaged line, which is then skipped. By default that
        error is raised.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                # Only the last line can be unfinished. After a power cut it may consist of zeros,
                # for blocks that had not reached the disk.
                if not line.endswith(b"\n"):
                    return
                try:
                    yield number, _row(path, number, line)
                except ConfigError as error:
                    if pass_by is None:
                        raise
                    pass_by(error)
    except OSError as exc:
        raise ConfigError(
            "log", str(path), f"cannot be read ({exc.strerror})", "make it readable"
        ) from exc


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise _damaged(path, number, f"is not valid JSON ({exc})") from exc
    if not isinstance(row, dict):
        raise _damaged(path, number, "is not a JSON object")
    return row


def _damaged(path: Path, number: int, what: str) -> ConfigError:
    return ConfigError(
        "log",
        str(path),
        f"line {number} {what}",
        "remove that line, or move the file away; checkpoints and the model do not depend on it",
    )


def rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Read the rows of a log up to ``step``.

    Raises ConfigError as `read_lines` does, and if a row has no step.
    """
    rows = read_lines(path)
    for number, row in enumerate(rows, start=1):
        if type(_step_of(row)) is not int:
            raise _damaged(path, number, "has no step")
    return [row for row in rows if _step_of(row) <= step]


def _step_of(row: Mapping[str, Any]) -> Any:
    """Return the step of a row, or the last step of a window's row.

    In a damaged log it can be any JSON value.
    """
    return row.get("step", row.get("last_step"))


def check_logs(folder: RunFolder) -> None:
    """Raise ConfigError if `truncate_logs` would; this runs before the process group exists."""
    for path in _logs_in(folder):
        rows_until(path, 0)


def _logs_in(folder: RunFolder) -> list[Path]:
    paths = (folder.events_to_read if path == folder.events else path for path in folder.logs)
    return [path for path in paths if path.is_file()]


def truncate_logs(folder: RunFolder, step: int) -> None:
    """Truncate the logs after ``step``, so that a resumed run has each step once.

    The events file of version 0.1.0 is first renamed to its current name.

    Raises ConfigError if a log cannot be parsed, and OSError if it cannot be written.
    """
    events = folder.events_to_read
    if events != folder.events:
        events.rename(folder.events)
        sync_folder(folder.path)
    for path in _logs_in(folder):
        kept = "".join(json_text(row) + "\n" for row in rows_until(path, step)).encode()
        if kept == path.read_bytes():
            continue  # Do not rewrite it: a full disk may not hold it twice.
        replace_file(path, kept)


def sync_logs(folder: RunFolder) -> None:
    """Sync a run's logs to disk: before the checkpoint of their steps is committed, and when a job ends."""
    for path in _logs_in(folder):
        # An error must not cost the checkpoint; the writer of the log has already warned of it.
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class RunLog:
    """The logs of a run in its output folder, which only rank 0 writes.

    monitor: an `EnduringMonitor`, or None on ranks other than 0. It is created once per job and
        attached to each engine, so that every tracker shows one run with an unbroken axis (samples,
        as in DeepSpeed's own events).
    say: prints one warning per file that cannot be written; training continues.
    """

    def __init__(
        self, folder: RunFolder, monitor: Any | None, say: Callable[[str], None] = print
    ) -> None:
        self._folder = folder
        self._say = say
        self._warned = set[Path]()
        self.monitor = monitor
        self._open()

    def _open(self) -> None:
        paths = self._folder.logs if self.monitor is not None else ()
        self._files = {path: JsonLines(path) for path in paths}

    def _write(self, path: Path, row: Mapping[str, Any]) -> None:
        if self.monitor is None:
            return
        lost = self._files[path].write(row)
        if lost is not None and path not in self._warned:
            self._warned.add(path)
            self._say(f"warning: {path} {lost}; training continues")

    def metrics(self, row: Mapping[str, Any], samples: int) -> None:
        """Write the row of a logged step; its numbers also go to the trackers, at ``samples``."""
        self._write(self._folder.metrics, row)
        if self.monitor is not None:
            events = [
                (key, float(value), samples)
                for key, value in row.items()
                if isinstance(value, int | float) and key != "step"
            ]
            self.monitor.write_row(events)

    def event(self, kind: EventKind, step: int, **values: Any) -> None:
        """Write an event that happened after ``step`` steps."""
        self._write(self._folder.events, {"event": kind, "step": step, **values})

    def observation(self, observation: Observation) -> None:
        """Write an observation of the phase controller, so that its decisions can be replayed."""
        self._write(self._folder.observations, to_json(observation))

    def windows(self, row: Mapping[str, Any]) -> None:
        """Write the row of a closed window, with the verdict of the phase's test."""
        self._write(self._folder.windows, row)

    def rewind(self, cut: Callable[[], object], samples: int) -> None:
        """Close the files, call ``cut``, and reopen them; the trackers continue after ``samples``."""
        self._close_files()
        cut()
        self._open()
        if self.monitor is not None:
            self.monitor.rewind(samples)

    def close(self) -> None:
        """Close the files and the trackers, and sync the rows after the last checkpoint to disk."""
        self._close_files()
        if self.monitor is not None:
            sync_logs(self._folder)
            self.monitor.close()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()


@dataclass
class Meter:
    """What has been measured since the last reset.

    losses: for each step, its loss times its number of samples.
    step_s, data_s: seconds spent in all steps, and in waiting for data.
    top1, top5, judged: of the ``judged`` samples, how many had their label as the largest logit, and how many among
        the largest 5.
    corrupt: the number of samples that could not be read.
    """

    losses: list[float] = field(default_factory=list)
    samples: int = 0
    steps: int = 0
    step_s: float = 0.0
    data_s: float = 0.0
    corrupt: int = 0
    top1: int = 0
    top5: int = 0
    judged: int = 0

    def reset(self) -> None:
        self.losses = []
        self.samples = 0
        self.steps = 0
        self.step_s = 0.0
        self.data_s = 0.0
        self.corrupt = 0
        self.top1 = self.top5 = self.judged = 0

    def add(
        self,
        loss: float,
        samples: int,
        *,
        step_s: float,
        data_s: float,
        corrupt: int = 0,
        top1: int = 0,
        top5: int = 0,
        judged: int = 0,
    ) -> None:
        self.losses.append(loss * samples)
        self.samples += samples
        self.steps += 1
        self.step_s += step_s
        self.data_s += data_s
        self.corrupt += corrupt
        self.top1 += top1
        self.top5 += top5
        self.judged += judged

    @property
    def loss(self) -> float:
        """The mean loss per sample."""
        return math.fsum(self.losses) / self.samples

    def observation(self, step: int, norms: Mapping[str, Mapping[int, float]], spectra: Spectra) -> Observation:
        """Return the phase controller's observation of the samples since the last reset."""
        return Observation(step=step, samples=self.samples, loss=self.loss, norms=norms, spectra=spectra)

    def row(self) -> dict[str, float]:
        """Return the means per step since the last reset, and the number of corrupt samples.

        ``img_s`` is over all ranks and includes waiting for data. Returns {} if there was no step.
        """
        if not self.steps:
            return {}
        accuracy = {}
        if self.judged:
            accuracy = {"train/acc1": self.top1 / self.judged, "train/acc5": self.top5 / self.judged}
        return {
            "train/loss": self.loss,
            **accuracy,
            "step_s": self.step_s / self.steps,
            "data_s": self.data_s / self.steps,
            "img_s": self.samples / (self.step_s + self.data_s),
            "data/corrupt": self.corrupt,
        }


def norm_columns(norms: Mapping[str, Mapping[int, float]], group: str = "norm") -> dict[str, float]:
    """Convert norms (family -> layer -> norm) to the columns of a row: ``norm/q.03``."""
    return {
        f"{group}/{family}.{layer:02d}": norm
        for family, layers in norms.items()
        for layer, norm in layers.items()
    }


def stable_rank_columns(spectra: Spectra) -> dict[str, float]:
    """Convert spectra to the columns of a row: ``stable_rank/q.03``."""
    ranks = {family: {layer: spectrum.stable_rank for layer, spectrum in layers.items()}
             for family, layers in spectra.items()}
    return norm_columns(ranks, "stable_rank")
