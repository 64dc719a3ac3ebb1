"""The phase controller: a pure function from measurements to the next plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prelora_ds.config.tree import ConvergenceConfig, LoraConfig
from prelora_ds.core.convergence import Observation, WindowStats, changes_by_layer, close_window, partially_converged
from prelora_ds.core.phases import full_plan, lora_plan, warmup_plan
from prelora_ds.core.plan import Layout, Phase, Plan
from prelora_ds.core.ranks import assign_ranks
from prelora_ds.core.schedule import Timeline

# Closed windows that travel with the state, at least. A run that begins from this one's checkpoint may compare more of
# them than this one does; all of them would make the state grow without bound.
KEPT_WINDOWS = 32


@dataclass(frozen=True)
class PhaseState:
    """Where the run stands. ``windows`` are the last closed ones; ``reason`` is the last decision in words; ``open``
    are the measurements of the window that has not closed yet; ``tests`` counts the evaluations of Algorithm 1."""

    plan: Plan
    windows: tuple[WindowStats, ...] = ()
    open: tuple[Observation, ...] = ()
    reason: str = "training begins with all parameters"
    tests: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"plan": self.plan.to_json(), "windows": [w.to_json() for w in self.windows],
                "open": [o.to_json() for o in self.open], "reason": self.reason, "tests": self.tests}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PhaseState:
        return cls(plan=Plan.from_json(data["plan"]), windows=tuple(map(WindowStats.from_json, data["windows"])),
                   open=tuple(map(Observation.from_json, data["open"])), reason=data["reason"], tests=data["tests"])


class PhaseController:
    """FULL -> WARMUP when Algorithm 1 passes, WARMUP -> LORA after the warm-up; a transition is a new plan.

    With ``convergence`` None the run stays in FULL (the baseline).
    """

    def __init__(self, *, layout: Layout, timeline: Timeline, lora: LoraConfig,
                 convergence: ConvergenceConfig | None, seed: int) -> None:
        self.layout, self.timeline, self.lora, self.convergence, self.seed = layout, timeline, lora, convergence, seed

    def initial(self) -> PhaseState:
        return PhaseState(full_plan(self.layout, init_seed=self.seed))

    def next(self, state: PhaseState, observation: Observation) -> PhaseState:
        """The state after one more measurement; a transition happened exactly if the plan differs.

        Windows of m measurements are disjoint and go on through all phases (they are the run's history); Algorithm 1
        is evaluated when one closes, in FULL only. The warm-up ends at the first measurement at or after its duration.
        """
        if self.convergence is None:
            return state
        closed = len(state.open) + 1 >= self.convergence.m
        state = replace(state, open=(*state.open, observation))
        if closed:
            index = state.windows[-1].index + 1 if state.windows else 0
            window = close_window(index, state.open, self.convergence.statistic)
            kept = max(self.convergence.k, KEPT_WINDOWS)
            state = replace(state, open=(), windows=(*state.windows, window)[-kept:])
        if state.plan.phase is Phase.FULL and closed and len(state.windows) >= self.convergence.k:
            return self._test(state, observation.step)
        if state.plan.phase is Phase.WARMUP:
            return self._after_warmup(state, observation.step)
        return state

    def _test(self, state: PhaseState, step: int) -> PhaseState:
        assert self.convergence is not None
        c = self.convergence
        verdict = partially_converged(state.windows, k=c.k, tau=c.tau, zeta=c.zeta, aggregate=c.aggregate)
        state = replace(state, reason=verdict.reason, tests=state.tests + 1)
        if not verdict.passed:
            return state
        changes = changes_by_layer(*state.windows[-2:])
        ranks = assign_ranks({f: changes[f] for f in self.lora.families}, r_min=self.lora.r_min, r_max=self.lora.r_max)
        plan = warmup_plan(self.layout, ranks, alpha_over_r=self.lora.alpha_over_r, init_seed=self.seed,
                           since_step=step, train_a=self.lora.mode != "fa")
        return replace(state, plan=plan, reason=f"Algorithm 1 passed at test {state.tests}: {verdict.reason}")

    def _after_warmup(self, state: PhaseState, step: int) -> PhaseState:
        if step < self.timeline.step_after(state.plan.since_step, self.lora.warmup):
            return state
        plan = lora_plan(self.layout, state.plan, train_rest=self.lora.train_rest, since_step=step)
        return replace(state, plan=plan, reason=f"the warm-up of {self.lora.warmup} is over")
