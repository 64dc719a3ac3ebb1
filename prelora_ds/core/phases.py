"""The phases of a method, and the plan that each of them leads to. Every plan is made in this module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from prelora_ds.core.adapters import AdapterSpec, Option, kind_called
from prelora_ds.core.duration import Duration
from prelora_ds.core.layout import Layout
from prelora_ds.core.merge import Merge
from prelora_ds.core.plan import Plan
from prelora_ds.core.quantised import BF16
from prelora_ds.core.rank_rules import RankRule
from prelora_ds.core.rank_rules.uniform import UniformRank
from prelora_ds.core.selection import Selection, first_choice, with_active
from prelora_ds.core.switch_tests.prelora import Windowing
from prelora_ds.core.switch_tests.protocol import SwitchTest
from prelora_ds.core.trainable import trainable_names


@dataclass(frozen=True)
class Adapters:
    """New adapters, which a phase attaches when it begins, or new ranks for those that exist.

    scaling: the factor of what each adapter adds, the same for every rank (``alpha / rank`` in LoRA).
    rs_alpha: if it is not None, the factor is instead ``rs_alpha / sqrt(rank)`` (rsLoRA, Kalajdzievski 2023).
    resized: whether the adapters of the phase before continue, with other ranks. Otherwise they are merged.
    rechosen: how often ``ranks`` is applied again while the phase lasts; None never does.
    """

    kind: str
    families: tuple[str, ...]
    ranks: RankRule
    scaling: float = 1.0
    options: Mapping[str, Option] = field(default_factory=dict)
    resized: bool = False
    rechosen: Duration | None = None
    rs_alpha: float | None = None

    def scaling_at(self, rank: int) -> float:
        """The factor of what an adapter of this ``rank`` adds."""
        return self.scaling if self.rs_alpha is None else self.rs_alpha / math.sqrt(rank)


@dataclass(frozen=True)
class PhaseSpec:
    """One phase of a method.

    adapters: the new adapters; None keeps the existing ones.
    train: what trains, named as in `prelora_ds.core.trainable`.
    until: when the phase ends: after a duration, or when a test passes; None means at the end of the run.
    lr_scale: role -> factor of the learning rate (`Plan.lr_scale`).
    rewarm: how long the learning rate rises to its schedule when the phase begins.
    freeze_below: a block; everything that the module defines before it is frozen.
    merge: when the adapters are merged and begin again; None never merges them.
    selection: which adapters train at a time; None trains all of them.
    resets_moments: whether all Adam moments and steps begin at zero when the phase begins.
    base_dtype: the type of the frozen weights that have adapters (`Plan.base_dtype`).
    """

    name: str
    adapters: Adapters | None = None
    train: tuple[str, ...] = ("all",)
    until: Duration | SwitchTest | None = None
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    rewarm: Duration | None = None
    freeze_below: int | None = None
    merge: Merge | None = None
    selection: Selection | None = None
    resets_moments: bool = False
    base_dtype: str = BF16


def plan_of(spec: PhaseSpec, layout: Layout, *, seed: int, since_step: int = 0,
            before: Plan | None = None, ranks: Mapping[str, Mapping[int, int]] | None = None) -> Plan:
    """The plan of a phase that begins after ``since_step`` and follows the plan ``before``.

    seed: the seed of the first values of adapters.
    ranks: family -> layer -> rank, for the families of the phase's new adapters. A linear of rank 0 gets none.

    Raises ValueError for a set of parameters that matches nothing, for a layer or kind that does not exist, if nothing
    trains, and if more adapters are to train at a time than there are.
    """
    if spec.adapters is None:
        adapters = {} if before is None else dict(before.adapters)
        unadapted = frozenset() if before is None else before.unadapted
    else:
        assert ranks is not None, "a phase with new adapters needs their ranks"
        new = spec.adapters
        rank_of = {layout.targets[family][layer]: rank for family, layers in ranks.items()
                   for layer, rank in layers.items()}
        ranked = kind_called(new.kind).can.ranked
        adapters = {path: AdapterSpec(new.kind, rank if ranked else None, new.scaling_at(rank), seed, new.options)
                    for path, rank in rank_of.items() if rank}
        unadapted = frozenset(path for path, rank in rank_of.items() if not rank)

    trainable = trainable_names(spec.train, layout, adapters, unadapted)
    plan = Plan(spec.name, trainable, adapters, lr_scale=dict(spec.lr_scale), since_step=since_step,
                cycle=_cycle(spec, before), unadapted=unadapted, base_dtype=spec.base_dtype)
    if spec.freeze_below is not None:
        plan = _frozen_below(plan, layout, spec.freeze_below)
    if not plan.trainable:
        raise ValueError("no parameter would train")
    if spec.selection is None:
        return plan
    chosen = first_choice(spec.selection, plan, layout, seed)
    return with_active(plan, layout, chosen, cut_backward=spec.selection.cut_backward)


def _cycle(spec: PhaseSpec, before: Plan | None) -> int:
    """New adapters that replace others begin another cycle: the others are merged."""
    if before is None:
        return 0
    replaces = spec.adapters is not None and not spec.adapters.resized and before.adapters
    return before.cycle + bool(replaces)


def with_ranks(plan: Plan, layout: Layout, ranks: Mapping[str, Mapping[int, int]]) -> Plan:
    """``plan`` with other ranks of its adapters. ranks: family -> layer -> rank."""
    adapters = dict(plan.adapters)
    for family, layers in ranks.items():
        for layer, rank in layers.items():
            path = layout.targets[family][layer]
            adapters[path] = replace(adapters[path], rank=rank)
    return replace(plan, adapters=adapters)


def _frozen_below(plan: Plan, layout: Layout, layer: int) -> Plan:
    """``plan`` with everything frozen that the module defines before block ``layer``, including adapters there.

    The backward pass then ends at that block.
    """
    below = set(layout.before(layer))
    below |= {name for name, (path, _) in plan.leaves(layout).items() if f"{path}.weight" in below}
    return replace(plan, trainable=plan.trainable - below)


def plans_at_rank(phases: Sequence[PhaseSpec], layout: Layout, lora_rank: int | None = None, *,
                  seed: int = 0) -> list[Plan]:
    """The plan of each phase, with the same rank for all adapters whose rank a rule would choose.

    These plans serve predictions, timings and checks before the ranks are known.
    lora_rank: that rank; the default is the highest rank of each rule.
    seed: the seed of the run, on which the first choice of adapters depends.
    """
    plans: list[Plan] = []
    for spec in phases:
        ranks = None
        if spec.adapters is not None:
            rule = spec.adapters.ranks
            known = rule if isinstance(rule, UniformRank) else UniformRank(lora_rank or rule.highest)
            ranks = known(layers_of(spec.adapters, layout), ())
        plans.append(plan_of(spec, layout, seed=seed, before=plans[-1] if plans else None, ranks=ranks))
    return plans


def needed_in_fp32(phases: Sequence[PhaseSpec], layout: Layout, index: int) -> frozenset[str]:
    """The parameters of phase ``index``, adapters included, whose fp32 values are kept while they are frozen.

    A later phase trains them, or in this phase or a later one they are quantised, or adapters are merged into them.
    Leaves of adapters that a rule for ranks will leave out are among them, because the ranks need not be known yet.
    """
    plans = plans_at_rank(phases, layout)
    needed = {name for plan in plans[index + 1:] for name in plan.trainable}
    for i in range(index, len(plans)):
        needed |= plans[i].quantised()
        here = phases[i].adapters
        then = phases[i + 1].adapters if i + 1 < len(plans) else None
        is_merged = phases[i].merge is not None or then is not None  # an adapter that shrinks is partly merged
        is_shrunk = here is not None and here.rechosen is not None
        if is_merged or is_shrunk:
            needed |= {f"{path}.weight" for path in plans[i].adapters}
    return frozenset(needed & plans[index].parameters(layout).keys())


def layers_of(adapters: Adapters, layout: Layout) -> dict[str, list[int]]:
    """Family -> the layers whose linears ``adapters`` wrap."""
    return {family: list(layout.targets[family]) for family in adapters.families}


def switch_tests(phases: Sequence[PhaseSpec]) -> list[SwitchTest]:
    """The tests that end ``phases``, without durations."""
    return [spec.until for spec in phases if spec.until is not None and not isinstance(spec.until, Duration)]


def windowing_of(phases: Sequence[PhaseSpec], index: int) -> Windowing | None:
    """How the windows are made that close during phase ``index``; None if no test of the method looks at windows.

    The test of that phase decides, otherwise that of the nearest earlier phase whose test looks at windows, otherwise
    of the nearest later phase. Windows continue through phases without such a test, because they are the run's history
    and ranks may depend on them.
    """
    order = [index, *range(index - 1, -1, -1), *range(index + 1, len(phases))]
    tests = switch_tests([phases[i] for i in order])
    return next((test.windowing for test in tests if test.windowing is not None), None)
