"""Record a run: steps, events, observations and windows in its logs, and lines on the terminal."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch.distributed as dist

from prelora_ds.core.codec import to_json
from prelora_ds.core.controller import PhaseState
from prelora_ds.core.merge import Reset
from prelora_ds.core.plan import Plan
from prelora_ds.core.quantised import BF16
from prelora_ds.core.selection import active_adapters
from prelora_ds.core.stragglers import Change, StragglerWatch
from prelora_ds.core.switch_tests.prelora import Observation
from prelora_ds.cost.bytes import predict_bytes, worst_deviation
from prelora_ds.cost.forecast import why_unfinished
from prelora_ds.data.setup import fingerprints
from prelora_ds.engine.census import PeakMemory, census
from prelora_ds.engine.engine import Engine, StepStats
from prelora_ds.engine.merge import MergeReport
from prelora_ds.engine.monitor import EnduringMonitor
from prelora_ds.engine.trackers import make_trackers
from prelora_ds.engine.transition import Switch
from prelora_ds.run.checkpoints.resume import Checkpoint
from prelora_ds.run.context import Run
from prelora_ds.run.evaluate import Accuracy
from prelora_ds.run.log import EventKind, RunLog
from prelora_ds.run.run_state import RunState
from prelora_ds.version import git_commit, versions

DEVIATION_WARNING = 0.05


class Progress(Protocol):
    """The display of a run on the terminal."""

    def say(self, text: str) -> None: ...

    def step(self, row: Mapping[str, Any]) -> None: ...


class Records:
    """The logs of a run and its lines on the terminal; this job starts after ``begun_at`` steps."""

    def __init__(self, run: Run, progress: Progress, begun_at: int) -> None:
        self.run = run
        self.progress = progress
        self.say: Callable[[str], None] = progress.say
        self._stragglers = StragglerWatch(run.hosts)
        self._peak = PeakMemory()
        monitor = self._make_monitor(begun_at) if dist.get_rank() == 0 else None
        self._log = RunLog(run.folder, monitor, self.say)

    # ---- files

    def _make_monitor(self, begun_at: int) -> EnduringMonitor:
        config, folder = self.run.config.run, self.run.folder
        trackers = make_trackers(config.trackers, folder.tensorboard, folder.trackers, config.name,
                                 config.project, self.say)
        return EnduringMonitor(trackers, self.run.samples(begun_at), self.say)

    def rewind(self, step: int, cut: Callable[[], object]) -> None:
        """Continue the logs after ``step`` steps; ``cut`` removes the later rows from the files."""
        self._log.rewind(cut, self.run.samples(step))

    def close_logs(self) -> None:
        self._log.close()

    def attach_monitor(self, engine: Engine) -> None:
        """Let DeepSpeed write its own metrics into the run's trackers."""
        if self._log.monitor is not None:
            engine.ds.monitor = self._log.monitor

    # ---- steps

    def step(self, state: RunState, engine: Engine, step: int, stats: StepStats, lr: float,
             measured: dict[str, Any]) -> None:
        """Log a step: what was ``measured``, and the means since the last logged step."""
        row = self._row(engine, step)
        row |= measured
        row |= {"lr": lr, "grad_norm": stats.grad_norm}
        row |= state.logged.row()
        row |= self._peak.columns()
        self._log.metrics(row, samples=self.run.samples(step))
        self.progress.step(row)
        state.logged.reset()

    def last_step(self, engine: Engine, step: int, stats: StepStats, **more: float) -> None:
        """Log the step that ends the run with an error; ``more``: further columns of its row."""
        row = self._row(engine, step)
        row |= {"train/loss": stats.loss, "grad_norm": stats.grad_norm}
        row |= more
        self._log.metrics(row, samples=self.run.samples(step))

    def _row(self, engine: Engine, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": self.run.timeline.epoch_at(step),
            "phase": engine.plan.phase,
        }

    def stragglers(self, step: int, stats: StepStats) -> None:
        """Report and log the ranks that begin or cease to slow down the others."""
        seconds = stats.step_s + stats.data_s[dist.get_rank()]
        for slow in self._stragglers.add(seconds, forward=stats.forward_s, data=stats.data_s):
            self.say(str(slow) if slow.change == Change.ENDED else f"warning: {slow}")
            self._log.event(EventKind.STRAGGLER, step, **to_json(slow))

    def bytes(self, engine: Engine, step: int) -> None:
        """Log the predicted and the measured bytes of this rank at the end of a backward pass.

        Warns if they differ.
        """
        predicted = predict_bytes(
            engine.plan,
            self.run.layout,
            engine.config.zero,
            dist.get_world_size(),
            after_backward=True,
            kernel=engine.config.kernel(),
            parked=frozenset(engine.parked),
        )
        measured = census(engine)
        deviation = worst_deviation(predicted, measured)
        self._log.event(
            EventKind.BYTES,
            step,
            phase=engine.plan.phase,
            predicted=to_json(predicted),
            measured=measured,
            worst_deviation=deviation,
        )
        if deviation > DEVIATION_WARNING:
            self.say(
                f"warning: memory in phase {engine.plan.phase} differs from the prediction by "
                f"{deviation:.1%}: predicted {to_json(predicted)}, measured {measured}"
            )

    # ---- phases

    def observation(self, observation: Observation) -> None:
        self._log.observation(observation)

    def decision(self, before: PhaseState, after: PhaseState, step: int) -> None:
        """Log the window that has just closed, if any, and report the verdict if it was tested.

        Once a phase is over, that the next one waits for windows is logged and reported, too.
        """
        same_phase = after.index == before.index
        if same_phase and after.tests == before.tests and after.reason != before.reason:
            self._log.event(EventKind.WAIT, step, phase=before.plan.phase, reason=after.reason)
            self.say(f"step {step}: {after.reason}")
        last_before = [window.index for window in before.windows[-1:]]
        last_after = [window.index for window in after.windows[-1:]]
        if last_after == last_before:
            return
        window = after.windows[-1]
        tested = after.tests > before.tests
        self._log.windows(
            {
                "phase": before.plan.phase,
                **to_json(window),
                "tests": after.tests,
                "verdict": after.reason if tested else None,
            }
        )
        if tested:
            self.say(f"window {window.index}: {after.reason}")

    def plan(self, engine: Engine, phase: PhaseState, step: int, switch: Switch | None) -> None:
        """Log a plan that begins after ``step``, and the reason for it.

        switch: what the rebuild of the engine cost; None if the engine was not rebuilt.
        """
        self.attach_monitor(engine)
        self._peak.restart()
        plan = engine.plan
        shapes = plan.parameters(self.run.layout)
        trainable = sum(math.prod(shapes[name]) for name in plan.trainable)
        self._log.event(
            EventKind.PLAN,
            step,
            phase=plan.phase,
            reason=phase.reason,
            trainable_parameters=trainable,
            all_parameters=sum(map(math.prod, shapes.values())),
            switch=to_json(switch),
            plan=to_json(plan),
        )
        if plan.active is not None:
            self.active(step, phase)
        if switch is not None:
            released_mib = switch.released_bytes / 2**20
            self.say(
                f"-> {plan.phase} after step {step} ({phase.reason}): "
                f"{trainable:,} trainable parameters; "
                f"released {released_mib:,.1f} MiB in {switch.seconds:.1f} s"
            )

    def merge(self, step: int, plan: Plan, reset: Reset, report: MergeReport) -> None:
        """Log a merge of the adapters and what it moved."""
        self._log.event(
            EventKind.MERGE,
            step,
            cycle=plan.cycle,
            rule=reset.rule,
            reset_share=report.reset_share,
            output_change=report.output_change,
        )
        self.say(
            f"merged the adapters after step {step} (cycle {plan.cycle} begins): "
            f"{report.reset_share:.2%} of their moments reset, "
            f"outputs changed by {report.output_change:.2%}"
        )

    def base(self, step: int, before: Plan, after: Plan, output_change: float) -> None:
        """Log how much the outputs changed at a switch to, from or between quantised weights, and warn if by much.

        The limit is that of the phase with the quantised weights.
        """
        phase = (before if after.base_dtype == BF16 else after).phase
        base = self.run.config.phase(phase).base
        assert base is not None, "only such a phase quantises"
        self._log.event(
            EventKind.BASE,
            step,
            phase=after.phase,
            dtype=after.base_dtype,
            before=before.base_dtype,
            output_change=output_change,
            max_output_change=base.max_output_change,
        )
        self.say(
            f"the frozen weights below the adapters are in {after.base_dtype} after step {step} (before: "
            f"{before.base_dtype}): outputs changed by {output_change:.2%}"
        )
        if output_change > base.max_output_change:
            self.say(
                f"warning: that is more than phases.{phase}.base.max_output_change = {base.max_output_change:.2%}; to "
                "repeat the phase with weights in more bits, resume from an earlier checkpoint in another "
                "run.output_dir"
            )

    def accuracy(self, step: int, plan: Plan, quantised: Accuracy, fp32: Accuracy) -> None:
        """Log the accuracies of the final model on its quantised weights and on the fp32 values of these."""
        self._log.event(EventKind.ACCURACY, step, dtype=plan.base_dtype, quantised=to_json(quantised),
                        fp32=to_json(fp32))
        self.say(
            f"top-1 accuracy {quantised.acc1:.2%} on the {plan.base_dtype} weights that the adapters were trained on, "
            f"which are exported; {fp32.acc1:.2%} on the fp32 weights (prelora export --base fp32)"
        )

    def active(self, step: int, phase: PhaseState) -> None:
        """Log the adapters that train from the next step on, and how many steps have updated each adapter."""
        chosen = active_adapters(phase.plan, self.run.layout)
        self._log.event(EventKind.ACTIVE, step, adapters=sorted(chosen), updates=dict(phase.updates))

    def pruned(self, step: int, remaining: Mapping[str, int]) -> None:
        """Log how many components of each adapter remain after ``step``."""
        self._log.event(EventKind.PRUNED, step, remaining=dict(remaining))

    # ---- start and end

    def begun(self, state: RunState) -> None:
        """Log this job, and warn if the method cannot be finished within the run, which is probably a mistake."""
        run = self.run
        if dist.get_rank() == 0:  # git reads the checkout, which may be on a disk that all ranks share
            self._log.event(
                EventKind.JOB,
                state.step,
                command=shlex.join(sys.argv),
                commit=git_commit(),
                versions=versions(),
                hosts=list(dict.fromkeys(run.hosts)),
                world_size=dist.get_world_size(),
            )
        problem = why_unfinished(run.config, run.layout, run.timeline, state.phase, state.step)
        if problem is not None:
            self.say(f"warning: {problem}")

    def resumed(self, engine: Engine, checkpoint: Checkpoint) -> None:
        """Log that this job continues from ``checkpoint``."""
        step = checkpoint.run.step
        self._log.event(
            EventKind.RESUME,
            step,
            checkpoint=checkpoint.folder.name,
            world_size=dist.get_world_size(),
            zero_stage=engine.config.zero.stage,
        )
        self.say(f"resuming after step {step} from {checkpoint.folder}")

    def forked(self, phase: PhaseState, step: int) -> None:
        """Log the state with which a fork begins, from which its decisions can be replayed."""
        self._log.event(EventKind.FORK, step, state=to_json(phase))

    def end(self, phase: PhaseState) -> None:
        """Log the end of the run in ``phase``, with the peak memory of every rank. Collective."""
        peaks = [0] * dist.get_world_size()
        dist.all_gather_object(peaks, self._peak.rss_bytes())
        self._log.event(
            EventKind.END,
            self.run.timeline.total_steps,
            peak_rss_bytes=peaks,
            updates=dict(phase.updates),
            data=fingerprints(self.run.train_data, self.run.val_data),
        )
