"""What is due at a step: evaluations, norms, observations, rows of the log and checkpoints."""

from __future__ import annotations

from prelora_ds.config.tree import Config
from prelora_ds.core.duration import Duration
from prelora_ds.core.plan import Plan
from prelora_ds.core.schedule import Timeline

BYTES_MEASURED_AT = 3  # steps into a plan: ZeRO-3 frees parameters otherwise while it records its trace


class Due:
    """The steps of a run at which something beside training is done, in a job that began after step ``begun_at``."""

    def __init__(self, config: Config, timeline: Timeline, begun_at: int) -> None:
        self.begun_at = begun_at
        self._log_every, self._keep_best = config.train.log_every, config.checkpoint.keep_best
        self._evaluated = timeline.ticks(config.train.eval_every)
        self._observed = timeline.ticks(config.observe.every)
        self._normed = self._observed | timeline.ticks(Duration("1 epoch"))
        self._saves = config.checkpoint.every is not None
        saved = (every for every in (config.checkpoint.every, config.checkpoint.keep_every) if every is not None)
        self._saved = frozenset().union(*(timeline.ticks(every) for every in saved))

    def bytes(self, step: int, plan: Plan) -> bool:
        """Whether the bytes of ``plan`` are measured: once in each job, which may run at another ZeRO stage or on
        another number of ranks."""
        return step == max(plan.since_step, self.begun_at) + BYTES_MEASURED_AT

    def evaluation(self, step: int) -> bool:
        return step in self._evaluated

    def norms(self, step: int) -> bool:
        return step in self._normed

    def observation(self, step: int) -> bool:
        return step in self._observed

    def log(self, step: int) -> bool:
        return step % self._log_every == 0

    def checkpoint(self, step: int, *, improved: bool) -> bool:
        """Whether a checkpoint is due; so it is where an evaluation beat all before, and the best are kept."""
        return step in self._saved or (improved and self._saves and self._keep_best > 0)
