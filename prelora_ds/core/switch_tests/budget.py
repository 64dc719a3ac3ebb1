"""A phase that ends when the run has spent a number of FLOPs: a control at equal cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prelora_ds.core.switch_tests.prelora import Verdict, Windowing, WindowStats
from prelora_ds.core.switch_tests.progress import Progress, part_of


@dataclass(frozen=True)
class BudgetTest:
    """It passes at the first observation at which all steps so far, of all phases, have cost the budget.

    share: of what the whole run would cost if all parameters trained.
    flops: an absolute number of FLOPs.
    m: the observations of the windows that close meanwhile, on which ranks may depend; None closes none.

    FLOPs and not hours make the budget, because hours would not be the same twice. Raises ValueError unless exactly one
    of the two is set.
    """

    share: float | None = None
    flops: float | None = None
    m: int | None = None
    title = "the budget"
    k = 0
    needs = frozenset({"flops"})

    @property
    def windowing(self) -> Windowing | None:
        return None if self.m is None else Windowing(self.m)

    def __post_init__(self) -> None:
        if (self.share is None) == (self.flops is None):
            raise ValueError("a budget has either a share or a number of FLOPs")

    def __call__(self, windows: Sequence[WindowStats], progress: Progress) -> Verdict:
        if self.share is not None:
            budget = part_of(self.share, progress.full_flops)
            source = f"{100 * self.share:g} % of full training"
        else:
            assert self.flops is not None
            budget = math.ceil(self.flops)
            source = "the budget"
        return Verdict(progress.flops >= budget,
                       f"{progress.flops:.4g} FLOPs spent after step {progress.step}, {source} is {budget:.4g}")
