"""AdaLoRA's pruning without torch: when components of adapters are pruned, how many remain, and which.

A component of an adapter is what one of its singular values scales (Zhang et al. 2023, a "triplet"). There are as many
as its rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prelora_ds.core.duration import Duration
from prelora_ds.core.schedule import Timeline


@dataclass(frozen=True)
class Cut:
    """What the update of one optimizer step does to the components of adapters.

    keep: how many components of all adapters remain afterwards; None prunes nothing.
    final: whether pruning is over, so that the pruned components stay at zero and nothing is measured.
    """

    keep: int | None = None
    final: bool = False


@dataclass(frozen=True)
class Pruning:
    """How the components of the adapters of a kind are pruned.

    share: the share of all components that remain at the end.
    begin, end: when pruning begins and ends, counted from the step after which the adapters were attached.
    every: how often components are pruned, counted from ``begin``.
    beta1, beta2: the decay of the averages of sensitivity and uncertainty (equations 9 and 10).
    gate: the leaf whose elements are set to zero, one per component.
    axes: leaf -> the axis along which the components lie.
    """

    share: float
    begin: Duration
    end: Duration
    every: Duration
    beta1: float
    beta2: float
    gate: str
    axes: Mapping[str, int]

    def cut(self, timeline: Timeline, components: int, *, since: int, last: int, step: int) -> Cut:
        """What optimizer step ``step`` prunes.

        components: the number of components of all adapters.
        since: the step after which the adapters were attached.
        last: the last step that has pruned, or 0.

        The number of those that remain falls by a cube from all to ``share`` (equation 12). If the run is over earlier,
        pruning ends with it.
        """
        begin = timeline.step_after(since, self.begin)
        end = max(begin, min(timeline.step_after(since, self.end), timeline.total_steps))
        if last >= end:
            return Cut(final=True)
        if step < end and step not in timeline.period_ends(begin, self.every):
            return Cut()
        left = max(0, end - step) / max(1, end - begin)
        fewest = max(1, round(self.share * components))
        return Cut(keep=fewest + int((components - fewest) * left**3))


def largest(scores: Sequence[float], count: int) -> frozenset[int]:
    """Return the positions of the ``count`` largest ``scores``; of equal ones the first."""
    return frozenset(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])
