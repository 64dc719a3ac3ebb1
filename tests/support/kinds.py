"""Plans with adapters of any kind."""

from __future__ import annotations

from dataclasses import replace

from prelora_ds.core.adapters import KINDS, AdapterSpec, rank_of
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import PhaseSpec, plan_of
from prelora_ds.core.plan import Plan


def of_kind(plan: Plan, layout: Layout, kind: str, *, scaling: float = 2.0) -> Plan:
    """Return ``plan``, the first one with adapters, with those of another ``kind`` in their place.

    A kind that has one rank for all gets the smallest one, and one without a scaling the scaling 1.
    """
    can = KINDS[kind].can
    smallest = min(rank_of(spec) for spec in plan.adapters.values()) if can.ranked else None
    adapters = {path: AdapterSpec(kind, spec.rank if can.rank_per_module else smallest, scaling if can.scaled else 1.0,
                                  spec.seed)
                for path, spec in plan.adapters.items()}
    before = replace(plan, adapters=adapters)
    return plan_of(PhaseSpec(plan.phase), layout, seed=0, since_step=plan.since_step, before=before)


def frozen(plan: Plan, layout: Layout) -> Plan:
    """Return the plan of a LoRA phase after ``plan``."""
    spec = PhaseSpec("lora", train=("adapters", "rest"))
    return plan_of(spec, layout, seed=0, since_step=plan.since_step + 3, before=plan)
