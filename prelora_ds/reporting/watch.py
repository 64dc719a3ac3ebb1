"""The state of a run as its folder shows it, for `prelora watch`."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

from prelora_ds.config.load import load_config
from prelora_ds.config.tree import Config
from prelora_ds.core.codec import CodecError, from_json
from prelora_ds.core.duration import Duration
from prelora_ds.core.phases import switch_tests
from prelora_ds.core.schedule import Timeline
from prelora_ds.core.switch_tests.fixed import FixedTest
from prelora_ds.core.switch_tests.prelora import (
    PreloraTest,
    Verdict,
    WindowStats,
    partially_converged,
)
from prelora_ds.core.switch_tests.progress import part_of
from prelora_ds.errors import ConfigError
from prelora_ds.hosts.heartbeat import HEARTBEAT_FILE, read_json
from prelora_ds.hosts.lock import DEAD_AFTER_S, is_dead
from prelora_ds.reporting.follow import LogFollower
from prelora_ds.reporting.history import OWNERS, finite
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import EventKind
from prelora_ds.run.setup_record import SetupRecord, read_setup

RECENT = 50  # logged steps that speed and remaining time are calculated from
WINDOW = ("index", "last_step", "loss", "norms")
CURVE = 64  # points of the loss curve, at least


@dataclass(frozen=True)
class TestState:
    """How far Algorithm 1 is in the current phase; changes in per cent.

    changes: family -> the change of its norm that is largest among the comparisons that count.
    loss_change: likewise for the loss; None before the first comparison.
    held: how many of the latest comparisons kept all thresholds in a row, of the ``needed`` ones.
    next_step: the step after which the test is next made.
    """

    tau: float
    zeta: float
    changes: dict[str, float]
    loss_change: float | None
    held: int
    needed: int
    next_step: int | None


@dataclass
class Status:
    """What `prelora watch` shows of a run; None stands for what is not known (yet).

    state: "running", "silent" (its heartbeat has stopped), "stopped", "finished", or "missing" (there is no run).
    heartbeat_s: the age of the heartbeat. seconds are those of this machine's clock.
    verdict: the last verdict of the test of the current phase.
    ends_at: the step after which a phase of fixed length ends.
    img_s, full_img_s: images per second, recently and in the first phase.
    data_share: the share of the time spent waiting for data.
    bytes_measured, bytes_predicted: of rank 0, in this phase.
    walltime_left_s: until the batch system ends the job.
    """

    run: str
    state: str = "missing"
    heartbeat_s: float | None = None
    attempt: int | None = None
    phase: str | None = None
    reason: str | None = None
    step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    losses: list[float] = field(default_factory=list)
    acc1: float | None = None
    lr: float | None = None
    test: TestState | None = None
    verdict: str | None = None
    ends_at: int | None = None
    img_s: float | None = None
    full_img_s: float | None = None
    data_share: float | None = None
    bytes_measured: int | None = None
    bytes_predicted: int | None = None
    eta_s: float | None = None
    walltime_left_s: float | None = None
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Curve:
    """At most 2 * CURVE means of a growing series, each of equally many values."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self._per_point = 1
        self._open: list[float] = []

    def add(self, value: float) -> None:
        self._open.append(value)
        if len(self._open) < self._per_point:
            return
        self.points.append(sum(self._open) / len(self._open))
        self._open = []
        if len(self.points) == 2 * CURVE:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self._per_point *= 2


class RunWatch:
    """Follows the logs of one run; `status` reads only what is new since the last call."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._start_over()
        self._metrics, self._events, self._windows = (
            LogFollower(path) for path in (folder.metrics, folder.events_to_read, folder.windows))
        self._heartbeat: tuple[object, float] | None = None
        self._read_at: tuple[int, ...] = ()

    def _start_over(self) -> None:
        self._last: dict[str, Any] = {}
        self._acc1: float | None = None
        self._curve = Curve()
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=RECENT)
        self._first: deque[float] = deque(maxlen=RECENT)
        self._first_phase: str | None = None
        self._plan: Mapping[str, Any] = {}
        self._bytes: Mapping[str, Any] | None = None
        self._ended = False
        self._windows_seen: deque[WindowStats] = deque(maxlen=RECENT)
        self._verdict: tuple[object, object] = (None, None)

    def status(self, now: float | None = None) -> Status:
        """Read what is new and return the status at ``now``, seconds since the epoch (default: the clock)."""
        now = time.time() if now is None else now
        found = Status(str(self._folder.path))
        if not os.path.isfile(self._folder.config):  # False as well where the path cannot be looked up
            return found
        self._follow()
        self._set_setup(found)
        found.state, found.heartbeat_s = self._life(now)
        found.attempt = self._attempt()
        self._set_progress(found)
        self._set_method(found)
        self._set_speed(found)
        if self._setup is not None and self._setup.ends_at is not None and found.state == "running":
            found.walltime_left_s = self._setup.ends_at - now
        for follower, path in ((self._metrics, self._folder.metrics), (self._events, self._folder.events),
                               (self._windows, self._folder.windows)):
            if follower.problem is not None:
                found.problems.append(f"{path.name} cannot be read ({follower.problem})")
            if follower.damaged:
                found.problems.append(f"{path.name}: line {follower.damaged[0]} is not JSON and is left out")
        return found

    # ---- reading

    def _follow(self) -> None:
        logs = [follower.read() for follower in (self._metrics, self._events, self._windows)]
        if any(replaced for replaced, _ in logs):  # a resumed run has cut its logs back
            folder = self._folder
            self._metrics, self._events, self._windows = map(
                LogFollower, (folder.metrics, folder.events_to_read, folder.windows))
            self._start_over()
            logs = [follower.read() for follower in (self._metrics, self._events, self._windows)]
        (_, metrics), (_, events), (_, windows) = logs
        for row in events:
            self._add_event(row)
        for row in metrics:
            self._add_step(row)
        for row in windows:
            self._verdict = row.get("phase"), row.get("verdict")
            try:
                self._windows_seen.append(from_json(WindowStats, {key: row[key] for key in WINDOW}))
            except (CodecError, KeyError, TypeError, ValueError):
                continue  # of another version; the changes cannot be shown

    def _add_event(self, row: Mapping[str, Any]) -> None:
        match row.get("event"):
            case EventKind.PLAN:
                self._plan, self._bytes = row, None
            case EventKind.BYTES:
                self._bytes = row
            case EventKind.RESUME:
                self._ended = False
            case EventKind.END:
                self._ended = True

    def _add_step(self, row: Mapping[str, Any]) -> None:
        phase, loss, img_s = row.get("phase"), finite(row.get("train/loss")), finite(row.get("img_s"))
        if self._first_phase is None:
            self._first_phase = phase
        if self._last.get("phase") != phase:
            self._recent.clear()
        self._last = {key: row.get(key) for key in ("step", "epoch", "phase", "train/loss", "lr")}
        acc1 = finite(row.get("val/acc1"))
        self._acc1 = self._acc1 if acc1 is None else acc1
        if loss is not None:
            self._curve.add(loss)
        if img_s is not None:
            self._recent.append({key: finite(row.get(key)) for key in ("img_s", "step_s", "data_s")})
            if phase == self._first_phase:
                self._first.append(img_s)

    def _set_setup(self, found: Status) -> None:
        """Read the config and the setup, again only if one of them has changed."""
        stamp = tuple(path.stat().st_mtime_ns if os.path.isfile(path) else 0
                      for path in (self._folder.config, self._folder.setup))
        if stamp != self._read_at:
            self._config: Config | None = None
            self._setup: SetupRecord | None = None
            self._problem: str | None = None
            try:
                self._config = load_config(self._folder.config, recipe_key="RUN")
                self._setup = read_setup(self._folder)
            except ConfigError as exc:
                self._problem = str(exc).splitlines()[0]
            self._read_at = stamp
        if self._problem is not None:
            found.problems.append(self._problem)

    def _life(self, now: float) -> tuple[str, float | None]:
        """The state of the run, and the age of its heartbeat: the lock that a live job renews every 5 s."""
        try:
            renewed = self._folder.lock.stat().st_mtime
        except OSError:
            return "finished" if self._ended else "stopped", None
        held = read_json(self._folder.lock)
        # The file's time comes from another clock, so a change that was seen here counts more.
        if self._heartbeat is None:
            self._heartbeat = held.get("renewals"), renewed
        elif self._heartbeat[0] != held.get("renewals"):
            self._heartbeat = held.get("renewals"), now
        age = max(0.0, now - self._heartbeat[1])
        if held and is_dead(held):
            return "stopped", age
        return "silent" if age > DEAD_AFTER_S else "running", age

    def _attempt(self) -> int | None:
        attempt = read_json(self._folder.supervise / HEARTBEAT_FILE).get("attempt")
        return attempt if isinstance(attempt, int) else None

    # ---- the parts of a status

    @property
    def _timeline(self) -> Timeline | None:
        if self._config is None or self._setup is None:
            return None
        train = self._config.train
        return Timeline(self._setup.samples, train.global_batch_size, train.duration)

    def _set_progress(self, found: Status) -> None:
        found.step = int(finite(self._last.get("step")) or 0)
        found.phase = self._last.get("phase") or self._plan.get("phase")
        found.reason = self._plan.get("reason")
        found.epoch = finite(self._last.get("epoch"))
        found.loss = finite(self._last.get("train/loss"))
        found.losses = list(self._curve.points)
        found.lr = finite(self._last.get("lr"))
        found.acc1 = self._acc1
        if self._timeline is not None:
            found.total_steps = self._timeline.total_steps
        if self._bytes is not None:
            found.bytes_measured, found.bytes_predicted = (_total(self._bytes.get(key))
                                                           for key in ("measured", "predicted"))

    def _set_method(self, found: Status) -> None:
        """What the end of this phase waits for."""
        timeline = self._timeline
        if self._config is None or timeline is None:
            return
        specs = [spec for spec in self._config.specs() if spec.name == found.phase]
        started = int(finite(self._plan.get("step")) or 0)
        for spec in specs:
            if isinstance(spec.until, Duration):
                found.ends_at = timeline.step_after(started, spec.until)
        for test in switch_tests(specs):
            phase, verdict = self._verdict
            found.verdict = verdict if phase == found.phase and isinstance(verdict, str) else None
            if isinstance(test, PreloraTest):
                next_ticks = partial(timeline.next_ticks, every=self._config.observe.every)
                found.test = _test_state(test, self._windows_seen, started, next_ticks)
            elif isinstance(test, FixedTest):
                found.ends_at = part_of(test.at, timeline.total_steps)
            elif found.verdict is None:
                found.verdict = f"{test.title} has not been made yet" if test.k else f"{test.title} ends this phase"

    def _set_speed(self, found: Status) -> None:
        if not self._recent:
            return
        found.img_s = median(row["img_s"] for row in self._recent)
        if self._first and found.phase != self._first_phase:
            found.full_img_s = median(self._first)
        seconds = [(row["step_s"], row["data_s"]) for row in self._recent
                   if row["step_s"] is not None and row["data_s"] is not None]
        if not seconds:
            return
        spent = sum(step_s + data_s for step_s, data_s in seconds)
        found.data_share = sum(data_s for _, data_s in seconds) / spent if spent else None
        if found.total_steps is not None and found.state != "finished":
            found.eta_s = (found.total_steps - found.step) * spent / len(seconds)


def _test_state(test: PreloraTest, seen: Sequence[WindowStats], started: int,
                next_ticks: Callable[..., list[int]]) -> TestState:
    """Judge those of the windows ``seen`` that began after step ``started``.

    next_ticks: returns the steps of so many observations after a step.
    """
    sliding = test.windowing.sliding
    if sliding:
        own = next_ticks(started, count=test.m)  # the observations of the first window that began in this phase
        windows = [window for window in seen if len(own) == test.m and window.last_step >= own[-1]]
    else:
        before = {window.index + 1: window.last_step for window in seen} | {0: 0}
        windows = [window for window in seen if before.get(window.index, -1) >= started]
    changes: dict[str, float] = {}
    loss_change = None
    held = 0
    if len(windows) >= 2:
        compared = min(test.k, len(windows))
        verdict = _judged(test, windows[-compared:])
        changes = {family: max(map(abs, found)) for family, found in verdict.norm_changes.items()}
        loss_change = max(map(abs, verdict.loss_changes))
        while held < compared - 1 and _judged(test, windows[-held - 2:]).passed:
            held += 1

    # The first test follows k windows, and each later one another window.
    last = seen[-1].last_step if seen else 0
    if sliding and len(windows) < test.k:
        missing = test.m + test.k - 1
        coming = next_ticks(started, count=missing)
    else:
        # A disjoint window that was open when the phase began does not count.
        is_open = last < started and any(step <= started for step in next_ticks(last, count=1))
        missing = 1 if sliding else test.m * (max(1, test.k - len(windows)) + is_open)
        coming = next_ticks(last, count=missing)
    next_step = coming[-1] if len(coming) == missing else None
    return TestState(test.tau, test.zeta, changes, loss_change, held, test.k - 1, next_step)


def _judged(test: PreloraTest, windows: Sequence[WindowStats]) -> Verdict:
    return partially_converged(windows, k=len(windows), tau=test.tau, zeta=test.zeta, aggregate=test.aggregate,
                               strict=test.strict, joined=test.joined)


def _total(by_owner: object) -> int | None:
    if not isinstance(by_owner, Mapping):
        return None
    return sum(value for owner in OWNERS if isinstance(value := by_owner.get(owner), int))
