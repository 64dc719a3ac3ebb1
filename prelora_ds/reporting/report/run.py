"""What a report knows of a run: its phases, curves and incidents, as `reading` finds them in its files."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

from prelora_ds.config.tree import Config
from prelora_ds.core.layout import family_and_layer
from prelora_ds.core.phases import switch_tests
from prelora_ds.core.switch_tests.combined import single_tests
from prelora_ds.core.switch_tests.prelora import PreloraTest
from prelora_ds.reporting.history import Active, End, Merged, Resume, Slow
from prelora_ds.reporting.report.curve import Curve
from prelora_ds.run.accuracy import StoredAccuracy
from prelora_ds.run.folder import RunFolder

WEIGHT_NORMS = ("norm", "norm_base", "norm_adapter")


@dataclass
class Phase:
    """What was logged of one phase.

    begins: the phase began after this step.
    ends: its last logged step so far.
    ranks: (first step, (family, layer) -> rank of the adapter), for each change in this phase; the rank is the number
        of components that remain (AdaLoRA).
    step_s, data_s, img_s: one value per logged step.
    peaks: column -> the highest value, for columns such as ``peak_gib``.
    """

    name: str
    begins: int
    reason: str
    trainable_parameters: int
    all_parameters: int | None
    switch_s: float | None
    ranks: list[tuple[int, Mapping[tuple[str, int], int]]]
    ends: int = 0
    loss: float | None = None
    acc1: float | None = None
    predicted: Mapping[str, int] | None = None
    measured: Mapping[str, int] | None = None
    step_s: array[float] = field(default_factory=lambda: array("d"))
    data_s: array[float] = field(default_factory=lambda: array("d"))
    img_s: array[float] = field(default_factory=lambda: array("d"))
    peaks: dict[str, float] = field(default_factory=dict)

    def median(self, column: str) -> float | None:
        values: array[float] = getattr(self, column)
        return median(values) if values else None


@dataclass
class Run:
    """The history of a run.

    label: its name in this report, different from that of every other run.
    curves: column of metrics.jsonl -> its curve; besides, ``mean norm/q`` is the mean of ``norm/q.*`` over layers, and
        ``change/q`` and ``change/loss`` are the changes between successive windows, in per cent, ``data wait`` is the
        share of the time, in per cent, and ``merge ...`` are what merges moved.
    last: column -> its last value. best: (top-1, step).
    planned_ranks: path of a linear -> rank of its adapter, by the last plan.
    not_a_number: column -> the step from which on its values are not numbers, to the end of the log.
    world_size: the ranks of the last job, if its record is there.
    facts: what was logged about the job, for keys of `reading.FACTS`.
    attempts: one sentence per attempt of `prelora supervise`.
    notes: what could not be read.
    """

    label: str
    folder: RunFolder
    config: Config | None
    config_hash: str | None
    phases: list[Phase] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    best: tuple[float, int] | None = None
    not_a_number: dict[str, int] = field(default_factory=dict)
    first_step: int = 0
    steps: int = 0
    epochs: float = 0.0
    hours: float = 0.0
    corrupt: int = 0
    resumes: list[Resume] = field(default_factory=list)
    stragglers: list[Slow] = field(default_factory=list)
    merges: list[Merged] = field(default_factory=list)
    active: list[Active] = field(default_factory=list)
    planned_ranks: Mapping[str, int] = field(default_factory=dict)
    end: End | None = None
    accuracy: StoredAccuracy | None = None
    world_size: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    attempts: list[str] = field(default_factory=list)
    attempt_hosts: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def clock(self) -> Curve:
        return self.curves["epoch"]

    def hours_at(self, step: int) -> float:
        """The hours of training up to ``step``."""
        point = self.clock.at(step)
        return 0.0 if point is None else point.hours

    @property
    def steps_per_epoch(self) -> float | None:
        return self.steps / self.epochs if self.epochs > 0 else None

    @property
    def samples(self) -> int | None:
        return None if self.config is None else self.steps * self.config.train.global_batch_size

    @property
    def ranks(self) -> int | None:
        """The number of ranks of the last job, if a log states it."""
        if self.end is not None:
            return len(self.end.peak_rss_bytes)
        logged = self.facts.get("world_size")
        if isinstance(logged, int):
            return logged
        if self.world_size is not None:
            return self.world_size
        return self.resumes[-1].world_size if self.resumes else None

    def families(self, kind: str = "norm") -> list[str]:
        """The families of linears that columns such as ``norm/q.03`` name, in the order of the log."""
        start = f"mean {kind}/"
        return [column.removeprefix(start) for column in self.curves if column.startswith(start)]

    def layers(self, family: str) -> list[int]:
        """The layers of a family with a weight norm."""
        mean, start = f"mean norm/{family}", f"norm/{family}."
        return sorted(int(column.removeprefix(start)) for column in self.curves if mean_of(column) == mean)

    def add(self, column: str, step: int, value: float) -> None:
        """Add a point to a curve, at the hours of the run so far."""
        self.curve(column).add(step, self.hours, value)

    def curve(self, column: str) -> Curve:
        """The curve of ``column``, which may be new."""
        found = self.curves.get(column)
        if found is None:
            found = self.curves[column] = Curve()
        return found


def linear_of(run: Run, path: str) -> tuple[str, int]:
    """The family and the layer of the linear at ``path``."""
    return family_and_layer(path, None if run.config is None else run.config.model.families)


def tests_of(run: Run) -> dict[str, PreloraTest]:
    """Name of a phase -> the test of Algorithm 1 that ends it, alone or with others."""
    specs = () if run.config is None else run.config.specs()
    return {spec.name: single for spec in specs for test in switch_tests([spec]) for single in single_tests(test)
            if isinstance(single, PreloraTest)}


@cache
def mean_of(column: str) -> str | None:
    """The mean that a column is a part of: ``mean norm/q`` for ``norm/q.03``."""
    kind, _, rest = column.partition("/")
    family, _, layer = rest.rpartition(".")
    return f"mean {kind}/{family}" if kind in WEIGHT_NORMS and family and layer.isdecimal() else None
