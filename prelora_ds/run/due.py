"""Determine what is due at a step: evaluations, norms, observations, log rows and checkpoints."""

from __future__ import annotations

from prelora_ds.config.tree import Config
from prelora_ds.core.duration import Duration
from prelora_ds.core.plan import Plan
from prelora_ds.core.schedule import Timeline

# Steps after the start of a plan. During the first ones ZeRO-3 is still recording its trace and
# frees parameters differently.
BYTES_MEASURED_AT = 3


class Due:
    """The steps at which a run does more than train; this job started after step ``begun_at``."""

    def __init__(self, config: Config, timeline: Timeline, begun_at: int) -> None:
        self.begun_at = begun_at
        self._log_every = config.train.log_every
        self._keep_best = config.checkpoint.keep_best
        self._evaluation_steps = timeline.ticks(config.train.eval_every)
        self._observation_steps = timeline.ticks(config.observe.every)
        self._norm_steps = self._observation_steps | timeline.ticks(Duration("1 epoch"))
        self._saves = config.checkpoint.every is not None
        intervals = (config.checkpoint.every, config.checkpoint.keep_every)
        ticks = [timeline.ticks(every) for every in intervals if every is not None]
        self._checkpoint_steps = frozenset().union(*ticks)

    def bytes(self, step: int, plan: Plan) -> bool:
        """Whether to measure the bytes of ``plan``.

        They are measured once per job, because each job may use another ZeRO stage or number of
        ranks.
        """
        return step == max(plan.since_step, self.begun_at) + BYTES_MEASURED_AT

    def evaluation(self, step: int) -> bool:
        return step in self._evaluation_steps

    def norms(self, step: int) -> bool:
        return step in self._norm_steps

    def observation(self, step: int) -> bool:
        return step in self._observation_steps

    def log(self, step: int) -> bool:
        return step % self._log_every == 0

    def checkpoint(self, step: int, *, improved: bool) -> bool:
        """Whether a checkpoint is due.

        improved: the evaluation at this step beat all earlier ones. A checkpoint is then due, too,
            if the best ones are kept.
        """
        if step in self._checkpoint_steps:
            return True
        return improved and self._saves and self._keep_best > 0
