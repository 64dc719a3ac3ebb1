"""What a run measures and writes while it goes: its logs, a JSON object per line, and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from prelora_ds.core.codec import to_json
from prelora_ds.core.switch_tests.prelora import Observation
from prelora_ds.errors import ConfigError
from prelora_ds.files import replace_file, sync_folder
from prelora_ds.run.folder import RunFolder


class EventKind(StrEnum):
    """What a row of the events tells: the value of its key ``event``."""

    PLAN = "plan"  # a plan that begins after ``step``, its reason, and what the switch to it cost
    BYTES = "bytes"  # predicted and measured, under the plan
    RESUME = "resume"  # from a checkpoint
    STRAGGLER = "straggler"  # a rank that holds up the others
    END = "end"  # the run has come to its end


def json_text(value: Any, *, indent: int | None = None) -> str:
    """``value`` as strict JSON: NaN and infinities, which JSON does not have, become null."""
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
    """A file of one JSON object per line, each with the operating system before `write` returns.

    It is a side channel: what cannot be written is lost, and training continues. `sync_logs` brings
    rows to the disk.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, -1
        with contextlib.suppress(OSError):  # the first row meets it again, and its writer is told
            self._open()

    def write(self, row: Mapping[str, Any]) -> str | None:
        """Append ``row``, or nothing of it.

        Returns what was lost of the file and why, in words; None if nothing was.
        """
        lost = None
        try:
            if self._descriptor >= 0 and not self._in_place():
                self.close()
                lost = "was removed or replaced; the rows before are lost"
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
            # Without waiting: somebody may have put a pipe there that nobody reads.
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
            with contextlib.suppress(OSError):  # a pipe or a device has no size
                os.ftruncate(self._descriptor, size)
            raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file.

    A last line that a kill or a power cut left unfinished is left out. Raises ConfigError, which names
    the line, for one that is not a JSON object, and for a file that cannot be read.
    """
    try:
        # After a power cut a file may end in zeros where its last blocks were not yet on disk.
        *lines, _ = path.read_bytes().rstrip(b"\0").split(b"\n")
    except OSError as exc:
        raise ConfigError(
            "log", str(path), f"cannot be read ({exc.strerror})", "make it readable"
        ) from exc
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise _damaged(path, number, f"is not JSON ({exc})") from exc
        if not isinstance(row, dict):
            raise _damaged(path, number, "is not a JSON object")
        rows.append(row)
    return rows


def _damaged(path: Path, number: int, what: str) -> ConfigError:
    return ConfigError(
        "log",
        str(path),
        f"line {number} {what}",
        "remove that line, or move the file away; checkpoints and the model do not depend on it",
    )


def rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of a log of steps up to ``step``.

    Raises ConfigError as `read_lines` does, and for a row without a step.
    """
    rows = read_lines(path)
    for number, row in enumerate(rows, start=1):
        if type(_step_of(row)) is not int:
            raise _damaged(path, number, "has no step")
    return [row for row in rows if _step_of(row) <= step]


def _step_of(row: Mapping[str, Any]) -> Any:
    """The step of a row, which for a window is its last one; whatever a damaged log has in its place."""
    return row.get("step", row.get("last_step"))


def check_logs(folder: RunFolder) -> None:
    """Raise ConfigError where `truncate_logs` would, for a run that has not started its ranks' group yet."""
    for path in _logs_in(folder):
        rows_until(path, 0)


def _logs_in(folder: RunFolder) -> list[Path]:
    found = (folder.events_to_read if path == folder.events else path for path in folder.logs)
    return [path for path in found if path.is_file()]


def truncate_logs(folder: RunFolder, step: int) -> None:
    """Take rows after ``step`` out of a run's logs: it continues from there, and writes them again.

    The events of a run of version 0.1.0 get the name of today first.

    Raises ConfigError for a log that cannot be understood, and OSError for one that cannot be written.
    """
    if (found := folder.events_to_read) != folder.events:
        found.rename(folder.events)
        sync_folder(folder.path)
    for path in _logs_in(folder):
        kept = "".join(json_text(row) + "\n" for row in rows_until(path, step)).encode()
        if kept == path.read_bytes():
            continue  # a full disk need not hold it twice
        replace_file(path, kept)


def sync_logs(folder: RunFolder) -> None:
    """Bring the rows of a run's logs to the disk, before a checkpoint of their steps has its name."""
    for path in _logs_in(folder):
        with contextlib.suppress(OSError):  # it has been warned of, and costs no checkpoint
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class RunLog:
    """The record of a run in its output folder, written only by rank 0 (``monitor`` is None elsewhere).

    monitor: what `make_monitor` returns, made once for the run and lent to each engine, so that
    TensorBoard sees one run with an unbroken axis (samples, as in DeepSpeed's own events).

    say: prints the one warning of each file that cannot be written; training continues.
    """

    def __init__(
        self, folder: RunFolder, monitor: Any | None, say: Callable[[str], None] = print
    ) -> None:
        self._folder, self._say, self._warned = folder, say, set[Path]()
        self._open(monitor)

    def _open(self, monitor: Any | None) -> None:
        self.monitor = monitor
        paths = self._folder.logs if monitor is not None else ()
        self._files = {path: JsonLines(path) for path in paths}

    def _write(self, path: Path, row: Mapping[str, Any]) -> None:
        if self.monitor is None:
            return
        lost = self._files[path].write(row)
        if lost is not None and path not in self._warned:
            self._warned.add(path)
            self._say(f"warning: {path} {lost}; training continues")

    def metrics(self, row: Mapping[str, Any], samples: int) -> None:
        """One logged step; its numbers also go to TensorBoard, at ``samples``."""
        self._write(self._folder.metrics, row)
        if self.monitor is not None:
            self.monitor.write_events([(key, float(value), samples) for key, value in row.items()
                                       if isinstance(value, int | float) and key != "step"])

    def event(self, kind: EventKind, step: int, **values: Any) -> None:
        """What happened after ``step`` steps."""
        self._write(self._folder.events, {"event": kind, "step": step, **values})

    def observation(self, observation: Observation) -> None:
        """What the phase controller decides by, so that its decisions can be made again."""
        self._write(self._folder.observations, to_json(observation))

    def windows(self, row: Mapping[str, Any]) -> None:
        """A closed window, and what Algorithm 1 said."""
        self._write(self._folder.windows, row)

    def rewind(self, cut: Callable[[], Any | None]) -> None:
        """Go on with the monitor that ``cut`` returns, in the files as it leaves them."""
        self.close()
        self._open(cut())

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self.monitor is not None:
            self.monitor.close()


@dataclass
class Meter:
    """What has been measured since the last reset.

    losses: of each step, times its samples. step_s, data_s: seconds of all steps, and of waiting for
    data. corrupt: samples that could not be read.
    """

    losses: list[float] = field(default_factory=list)
    samples: int = 0
    steps: int = 0
    step_s: float = 0.0
    data_s: float = 0.0
    corrupt: int = 0

    def reset(self) -> None:
        self.losses = []
        self.samples = self.steps = self.corrupt = 0
        self.step_s = self.data_s = 0.0

    def add(self, loss: float, samples: int, *, step_s: float, data_s: float, corrupt: int = 0) -> None:
        self.losses.append(loss * samples)
        self.samples, self.steps, self.corrupt = self.samples + samples, self.steps + 1, self.corrupt + corrupt
        self.step_s, self.data_s = self.step_s + step_s, self.data_s + data_s

    @property
    def loss(self) -> float:
        """Mean loss of a sample."""
        return math.fsum(self.losses) / self.samples

    def observation(self, step: int, norms: Mapping[str, Mapping[int, float]]) -> Observation:
        """What the phase controller sees of the samples since the last reset."""
        return Observation(step=step, samples=self.samples, loss=self.loss, norms=norms)

    def row(self) -> dict[str, float]:
        """Means of a step since the last reset, if there was one, and the sum of corrupt samples; ``img_s`` over all
        ranks, waiting for data included."""
        if not self.steps:
            return {}
        return {"train/loss": self.loss, "step_s": self.step_s / self.steps, "data_s": self.data_s / self.steps,
                "img_s": self.samples / (self.step_s + self.data_s), "data/corrupt": self.corrupt}


def norm_columns(norms: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Norms, family -> layer -> norm, as columns of a row: ``norm/q.03``."""
    return {f"norm/{family}.{layer:02d}": norm for family, layers in norms.items() for layer, norm in layers.items()}
