"""What a run records of itself: rows of steps, events, observations and windows, and its lines on the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch.distributed as dist

from prelora_ds.core.codec import to_json
from prelora_ds.core.controller import PhaseState
from prelora_ds.core.stragglers import StragglerWatch
from prelora_ds.core.switch_tests.prelora import Observation
from prelora_ds.cost.bytes import predict_bytes, worst_deviation
from prelora_ds.data.setup import fingerprints
from prelora_ds.engine.build import Engine, StepStats
from prelora_ds.engine.census import census, peak_rss_bytes
from prelora_ds.engine.runtime import make_monitor
from prelora_ds.engine.transition import Switch
from prelora_ds.run.checkpoints.resume import Checkpoint
from prelora_ds.run.context import Run
from prelora_ds.run.log import EventKind, RunLog
from prelora_ds.run.run_state import RunState

DEVIATION_WARNING = 0.05


class Progress(Protocol):
    """What a run tells whoever watches its terminal."""

    def say(self, text: str) -> None: ...

    def step(self, row: Mapping[str, Any]) -> None: ...



class Records:
    """The logs and the terminal of a run whose first step of this job comes after ``begun_at`` steps."""

    def __init__(self, run: Run, progress: Progress, begun_at: int) -> None:
        self.run, self.progress = run, progress
        self.say: Callable[[str], None] = progress.say
        self._stragglers = StragglerWatch(run.hosts)
        self.open_logs(begun_at)

    # ---- files

    def open_logs(self, step: int) -> None:
        """Open the logs, to continue them after ``step`` steps."""
        monitor = make_monitor(self.run.folder.tensorboard, self.run.samples(step), self.say)
        self._log = RunLog(self.run.folder, monitor, self.say)

    def close_logs(self) -> None:
        self._log.close()

    def lend_monitor(self, engine: Engine) -> None:
        """Let DeepSpeed write its own figures into the run's TensorBoard."""
        if self._log.monitor is not None:
            engine.ds.monitor = self._log.monitor

    # ---- steps

    def step(self, state: RunState, engine: Engine, step: int, stats: StepStats, lr: float,
             measured: dict[str, Any]) -> None:
        """A logged step: what was measured, and the means since the last such row."""
        row = self._row(engine, step) | measured | {"lr": lr, "grad_norm": stats.grad_norm} | state.logged.row()
        self._log.metrics(row, samples=self.run.samples(step))
        self.progress.step(row)
        state.logged.reset()

    def last_step(self, engine: Engine, step: int, stats: StepStats, **more: float) -> None:
        """The row of a step that ends the run by an error."""
        row = self._row(engine, step) | {"train/loss": stats.loss, "grad_norm": stats.grad_norm} | more
        self._log.metrics(row, samples=self.run.samples(step))

    def _row(self, engine: Engine, step: int) -> dict[str, Any]:
        return {"step": step, "epoch": self.run.timeline.epoch_at(step), "phase": engine.plan.phase}

    def stragglers(self, step: int, stats: StepStats) -> None:
        """Say and log which ranks hold up the others, if any do."""
        seconds = stats.step_s + stats.data_s[dist.get_rank()]
        for slow in self._stragglers.add(seconds, forward=stats.forward_s, data=stats.data_s):
            self.say(f"warning: {slow}")
            self._log.event(EventKind.STRAGGLER, step, **to_json(slow))

    def bytes(self, engine: Engine, step: int) -> None:
        """Log the predicted and the measured bytes of this rank at the end of a backward pass; warn where they
        differ."""
        predicted = predict_bytes(engine.plan, self.run.layout, engine.config.zero, dist.get_world_size(),
                                  after_backward=True, kernel=engine.config.kernel(), parked=frozenset(engine.parked))
        measured = census(engine)
        off = worst_deviation(predicted, measured)
        self._log.event(EventKind.BYTES, step, phase=engine.plan.phase, predicted=to_json(predicted),
                        measured=measured, worst_deviation=off)
        if off > DEVIATION_WARNING:
            self.say(f"warning: bytes of phase {engine.plan.phase} differ by {off:.1%} from the prediction: "
                     f"predicted {to_json(predicted)}, measured {measured}")

    # ---- phases

    def observation(self, observation: Observation) -> None:
        self._log.observation(observation)

    def decision(self, before: PhaseState, after: PhaseState) -> None:
        """Log a window that has closed, and say what its test found."""
        if [w.index for w in after.windows[-1:]] == [w.index for w in before.windows[-1:]]:
            return
        window, tested = after.windows[-1], after.tests > before.tests
        self._log.windows({"phase": before.plan.phase, **to_json(window), "tests": after.tests,
                           "verdict": after.reason if tested else None})
        if tested:
            self.say(f"window {window.index}: {after.reason}")

    def plan(self, engine: Engine, phase: PhaseState, switch: Switch | None) -> None:
        """Log a plan that begins and its reason; ``switch`` is what the engine's rebuild cost, if there was one."""
        self.lend_monitor(engine)
        plan, shapes = engine.plan, engine.plan.parameters(self.run.layout)
        trainable = sum(math.prod(shapes[name]) for name in plan.trainable)
        self._log.event(EventKind.PLAN, plan.since_step, phase=plan.phase, reason=phase.reason,
                        trainable_parameters=trainable, all_parameters=sum(map(math.prod, shapes.values())),
                        switch=to_json(switch), plan=to_json(plan))
        if switch is not None:
            self.say(f"-> {plan.phase} after step {plan.since_step}: {phase.reason}; {trainable:,} parameters train; "
                     f"{switch.released_bytes / 2**20:,.1f} MiB released, all of it gone, {switch.seconds:.1f} s")

    # ---- begin and end

    def resumed(self, engine: Engine, found: Checkpoint) -> None:
        """Log that this job continues from ``found``."""
        step = found.run.step
        self._log.event(EventKind.RESUME, step, checkpoint=found.folder.name, world_size=dist.get_world_size(),
                        zero_stage=engine.config.zero.stage)
        self.say(f"resumes after step {step}, from {found.folder}")

    def end(self) -> None:
        """Log that the run has come to its end, with the peak memory of every rank. Collective."""
        peaks = [0] * dist.get_world_size()
        dist.all_gather_object(peaks, peak_rss_bytes())
        self._log.event(EventKind.END, self.run.timeline.total_steps, peak_rss_bytes=peaks,
                        data=fingerprints(self.run.train_data, self.run.val_data))
