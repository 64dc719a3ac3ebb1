"""Plans of PreLoRA's three phases, for tests that need one without a recipe."""

from __future__ import annotations

from collections.abc import Mapping

from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import Adapters, PhaseSpec, plan_of, plans_at_rank
from prelora_ds.core.plan import Plan
from prelora_ds.core.rank_rules.prelora import PreloraRanks

Ranks = Mapping[str, Mapping[int, int]]


def prelora(
    layout: Layout, *, alpha_over_r: float = 1.0, train_a: bool = True, train_rest: bool = True
) -> list[PhaseSpec]:
    """Return PreLoRA's phases without their ends, with adapters on all linears of ``layout``."""
    adapters = Adapters(
        "lora",
        tuple(layout.targets),
        PreloraRanks(1, 4096),
        alpha_over_r,
        {} if train_a else {"train_a": False},
    )
    trained = ("adapters", "rest") if train_rest else ("adapters",)
    return [PhaseSpec("full"), PhaseSpec("warmup", adapters), PhaseSpec("lora", train=trained)]


def full_plan(layout: Layout) -> Plan:
    """Return the plan of the full phase."""
    return plan_of(PhaseSpec("full"), layout, seed=0)


def warmup_plan(
    layout: Layout,
    ranks: Ranks,
    *,
    alpha_over_r: float = 1.0,
    seed: int = 0,
    since_step: int = 0,
    train_a: bool = True,
) -> Plan:
    """Return the plan of the warm-up with the given ranks."""
    spec = prelora(layout, alpha_over_r=alpha_over_r, train_a=train_a)[1]
    return plan_of(spec, layout, seed=seed, since_step=since_step, ranks=ranks)


def lora_plan(
    layout: Layout,
    warmup: Plan,
    *,
    train_rest: bool = True,
    since_step: int = 0,
    freeze_below: int | None = None,
) -> Plan:
    """Return the plan of the LoRA phase after ``warmup``."""
    trained = ("adapters", "rest") if train_rest else ("adapters",)
    spec = PhaseSpec("lora", train=trained, freeze_below=freeze_below)
    return plan_of(spec, layout, seed=0, since_step=since_step, before=warmup)


def prelora_plans(
    layout: Layout,
    lora_rank: int,
    *,
    alpha_over_r: float = 1.0,
    train_a: bool = True,
    train_rest: bool = True,
) -> list[Plan]:
    """Return the plans of all three phases, with one rank for all adapters."""
    phases = prelora(layout, alpha_over_r=alpha_over_r, train_a=train_a, train_rest=train_rest)
    return plans_at_rank(phases, layout, lora_rank)
