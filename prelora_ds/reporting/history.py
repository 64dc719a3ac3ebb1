"""Read the parts of a run's logs and accuracy.json that the report needs.

They are checked while they are read, because anybody may have edited the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from prelora_ds.core.plan import Plan
from prelora_ds.errors import ConfigError
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import EventKind


def _printable(text: str) -> str:
    text.encode()  # raises a ValueError for a surrogate, which JSON can hold and no terminal can print
    return text


Text = Annotated[str, AfterValidator(_printable)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Real = Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]
# Logs of earlier versions have NaN and infinities where today's have null.
Measured = Annotated[
    Real | None,
    BeforeValidator(
        lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
    ),
]
OWNERS = ("weights", "gradients", "masters", "moments")


class Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", validate_by_name=True)


T = TypeVar("T", bound=Record)


class Step(Record):
    """A row of metrics.jsonl; None means not measured at this step, or not finite."""

    step: Annotated[Count, Field(ge=1)]
    epoch: Real
    loss: Measured = Field(None, alias="train/loss")
    acc1: Measured = Field(None, alias="val/acc1")
    step_s: Measured = None
    data_s: Measured = None


class Event(Record):
    """A row of events.jsonl; the report needs only the step of most kinds."""

    step: Count


class Resume(Event):
    """A job that continued from a checkpoint after ``step``."""

    checkpoint: Text = ""
    world_size: Count | None = None
    zero_stage: Count | None = None


class Switch(Record):
    """The cost of a switch."""

    seconds: Real


class Started(Event):
    """A plan that began after ``step``."""

    phase: Text
    reason: Text
    trainable_parameters: Count
    switch: Switch | None
    all_parameters: Count | None = None
    plan: Any = None

    @property
    def ranks(self) -> dict[str, int]:
        """Path of a linear -> rank of its adapter. Empty if the plan has none, or cannot be understood."""
        try:
            adapters = Plan.from_json(self.plan).adapters
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
            return {}
        return {path: spec.rank for path, spec in adapters.items() if spec.rank is not None}


class Merged(Event):
    """A merge of the adapters into the weights (ReLoRA)."""

    cycle: Count
    reset_share: Measured = None
    output_change: Measured = None


class Active(Event):
    """The adapters that train from the next step on, and how many steps have updated each adapter so far."""

    adapters: list[Text]
    updates: dict[Text, Count] = Field(default_factory=dict)


class Slow(Event):
    """A rank that slows down the others at ``what``, with its seconds per step and those of the median rank."""

    rank: Count
    host: Text
    what: Text
    seconds: Real
    usual: Real
    windows: Count = 1


class Bytes(Event):
    """Bytes of rank 0 by owner."""

    predicted: dict[str, Count]
    measured: dict[str, Count]

    @model_validator(mode="after")
    def _names_the_owners(self) -> Bytes:
        if not all(owner in side for owner in OWNERS for side in (self.predicted, self.measured)):
            raise ValueError(f"bytes have to name {', '.join(OWNERS)}")
        return self


class End(Event):
    """The end of a run, with the peak of resident bytes of each rank.

    data: key of the config -> the fingerprint of that data set. Earlier versions did not write it.
    """

    peak_rss_bytes: Annotated[list[Count], Field(min_length=1)]
    data: dict[str, Text] = Field(default_factory=dict)
    updates: dict[Text, Count] = Field(default_factory=dict)


class Accuracy(Record):
    """The result that `prelora evaluate` wrote; earlier versions wrote neither data nor identity."""

    correct: Count
    samples: Annotated[Count, Field(ge=1)]
    data: Text | None = None
    identity: Text | None = None

    @model_validator(mode="after")
    def _at_most_all_are_right(self) -> Accuracy:
        if self.correct > self.samples:
            raise ValueError(f"{self.correct} of {self.samples} cannot be right")
        return self


_KINDS: Mapping[str, type[Event]] = {
    EventKind.RESUME: Resume, EventKind.PLAN: Started, EventKind.BYTES: Bytes, EventKind.END: End,
    EventKind.MERGE: Merged, EventKind.ACTIVE: Active, EventKind.STRAGGLER: Slow}


def find_logs(folder: RunFolder) -> tuple[Path, Path]:
    """Return the files of metrics and events of the run in ``folder``. Raises ConfigError if there is no run."""
    if not folder.path.exists():
        raise ConfigError("RUN", str(folder.path), "does not exist", "pass the run.output_dir of a run")
    metrics, events = folder.metrics, folder.events_to_read
    if not metrics.is_file() or not events.is_file():
        raise ConfigError("RUN", str(folder.path), "does not contain a run", "pass the run.output_dir of a run")
    return metrics, events


def parse_steps(rows: Sequence[dict[str, Any]], path: Path) -> list[Step]:
    """Parse the ``rows`` of metrics.jsonl. Raises ConfigError, which names ``path`` and line."""
    return [parse_step(row, path, number) for number, row in enumerate(rows, start=1)]


def parse_events(rows: Sequence[dict[str, Any]], path: Path) -> list[Event]:
    """Parse the ``rows`` of the events. Raises ConfigError, which names ``path`` and line."""
    return [parse_event(row, path, number) for number, row in enumerate(rows, start=1)]


def parse_event(row: dict[str, Any], path: Path, number: int) -> Event:
    """Parse the row in line ``number`` of the events. Raises ConfigError, which names ``path`` and line."""
    return _parsed(_KINDS.get(str(row.get("event")), Event), row, path, f"line {number}")


def parse_step(row: dict[str, Any], path: Path, number: int) -> Step:
    """Parse the row in line ``number`` of metrics.jsonl. Raises ConfigError, which names ``path`` and line."""
    return _parsed(Step, row, path, f"line {number}")


def read_accuracy(path: Path) -> Accuracy:
    """Read an accuracy.json. Raises ConfigError."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as exc:
        raise ConfigError(
            "log", str(path), f"cannot be read ({exc.strerror})", "make it readable"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(
            "log", str(path), f"is not JSON ({exc})", "write it again with `prelora evaluate`"
        ) from exc
    return _parsed(Accuracy, content, path, "the file")


def _parsed(kind: type[T], row: Any, path: Path, where: str) -> T:
    try:
        return kind.model_validate(row)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"])) or "the row"
        raise ConfigError(
            "log",
            str(path),
            f"{where} cannot be understood: {key}: {first['msg']}",
            "restore that file, or move it away; checkpoints and the model do not depend on it",
        ) from exc
