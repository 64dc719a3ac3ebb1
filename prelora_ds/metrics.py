"""What a run measures and writes while it goes: metrics.jsonl, plans.jsonl, windows.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prelora_ds.core.convergence import Observation

LOGS = ("metrics", "plans", "windows")


class JsonLines:
    """A file of one JSON object a line, each on disk before `write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line that a kill cut short is left out."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
            if line.endswith("\n")]


def cut_back(folder: Path, step: int) -> None:
    """Take rows after ``step`` out of a run's files: it goes on from there, and each step shall be there once."""
    for name in LOGS:
        path = folder / f"{name}.jsonl"
        if path.is_file():
            rows = read_lines(path)
            kept = [row for row in rows if row.get("step", row.get("last_step", 0)) <= step]
            partial = path.with_suffix(".partial")
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in kept)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)


class RunLog:
    """The record of a run in its output folder, written by rank 0 alone (``monitor`` is None elsewhere).

    monitor: DeepSpeed's MonitorMaster, made once for the run and lent to each engine, so that TensorBoard sees one run
    with an unbroken axis (samples, as in DeepSpeed's own events).
    """

    def __init__(self, folder: Path, monitor: Any | None) -> None:
        self._folder = folder
        self._open(monitor)

    def _open(self, monitor: Any | None) -> None:
        self.monitor = monitor
        names = LOGS if monitor is not None else ()
        self._files = {name: JsonLines(self._folder / f"{name}.jsonl") for name in names}

    def metrics(self, row: Mapping[str, Any], samples: int) -> None:
        """One logged step; its numbers also go to TensorBoard, at ``samples``."""
        if self.monitor is not None:
            self._files["metrics"].write(row)
            self.monitor.write_events([(key, float(value), samples) for key, value in row.items()
                                       if isinstance(value, int | float) and key != "step"])

    def plans(self, row: Mapping[str, Any]) -> None:
        """A plan that begins, or the bytes measured under it."""
        if self.monitor is not None:
            self._files["plans"].write(row)

    def windows(self, row: Mapping[str, Any]) -> None:
        """A closed window, and what Algorithm 1 said."""
        if self.monitor is not None:
            self._files["windows"].write(row)

    def rewind(self, cut: Callable[[], Any | None]) -> None:
        """Go on with the monitor that ``cut`` returns, in the files as it leaves them."""
        self.close()
        self._open(cut())

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self.monitor is not None:
            self.monitor.tb_monitor.summary_writer.close()


class Meter:
    """Since the last reset: the sample-weighted loss, seconds of steps and of waiting for data, corrupt samples."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._losses: list[float] = []
        self.samples, self.steps, self.corrupt, self.step_s, self.data_s = 0, 0, 0, 0.0, 0.0

    def add(self, loss: float, samples: int, *, step_s: float, data_s: float, corrupt: int = 0) -> None:
        self._losses.append(loss * samples)
        self.samples, self.steps, self.corrupt = self.samples + samples, self.steps + 1, self.corrupt + corrupt
        self.step_s, self.data_s = self.step_s + step_s, self.data_s + data_s

    def to_json(self) -> dict[str, Any]:
        """All of it, exactly."""
        return {"losses": self._losses, "samples": self.samples, "steps": self.steps, "step_s": self.step_s,
                "data_s": self.data_s, "corrupt": self.corrupt}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Meter:
        meter = cls()
        meter._losses, meter.samples, meter.steps = list(data["losses"]), data["samples"], data["steps"]
        meter.step_s, meter.data_s, meter.corrupt = data["step_s"], data["data_s"], data["corrupt"]
        return meter

    @property
    def loss(self) -> float:
        """Mean loss of a sample."""
        return math.fsum(self._losses) / self.samples

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
