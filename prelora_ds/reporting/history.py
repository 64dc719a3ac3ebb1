"""Read the parts of a run's logs that the report needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from prelora_ds.core.plan import Plan
from prelora_ds.core.stragglers import Change
from prelora_ds.errors import ConfigError
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import EventKind
from prelora_ds.run.parsed import Count, Measured, Real, Record, Text, parsed

OWNERS = ("weights", "gradients", "masters", "moments")


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


class Pruned(Event):
    """How many components of each adapter remain after ``step`` (AdaLoRA)."""

    remaining: dict[Text, Count]


class Slow(Event):
    """A rank that slows down the others at ``what``, with its seconds per step and those of the median rank.

    change: a `Change`; with ``ended`` it slows them down no longer. Earlier versions did not write it.
    """

    rank: Count
    host: Text
    what: Text
    seconds: Real
    usual: Real
    windows: Count = 1
    change: Text = Change.BEGAN


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


_KINDS: Mapping[str, type[Event]] = {
    EventKind.RESUME: Resume, EventKind.PLAN: Started, EventKind.BYTES: Bytes, EventKind.END: End,
    EventKind.MERGE: Merged, EventKind.ACTIVE: Active, EventKind.STRAGGLER: Slow,
    EventKind.PRUNED: Pruned}


def finite(value: Any) -> float | None:
    """Return ``value`` if it is a finite number, otherwise None: a log may hold anything."""
    return value if type(value) in (int, float) and abs(value) <= 1e300 else None


def find_logs(folder: RunFolder) -> tuple[Path, Path]:
    """Return the files of metrics and events of the run in ``folder``. Raises ConfigError if there is no run."""
    if not os.path.exists(folder.path):
        raise ConfigError("RUN", str(folder.path), "does not exist", "pass the run.output_dir of a run")
    metrics = folder.metrics
    events = folder.events_to_read if os.path.isfile(metrics) else folder.events
    if not os.path.isfile(metrics) or not os.path.isfile(events):
        raise ConfigError("RUN", str(folder.path), "does not contain a run", "pass the run.output_dir of a run")
    return metrics, events


def parse_event(row: dict[str, Any], path: Path, number: int) -> Event:
    """Parse the row in line ``number`` of the events. Raises ConfigError, which names ``path`` and line."""
    return parsed(_KINDS.get(str(row.get("event")), Event), row, path, f"line {number}")


def parse_step(row: dict[str, Any], path: Path, number: int) -> Step:
    """Parse the row in line ``number`` of metrics.jsonl. Raises ConfigError, which names ``path`` and line."""
    return parsed(Step, row, path, f"line {number}")
