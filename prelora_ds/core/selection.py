"""DynaLoRA: only some adapters train at a time, and the choice is made again and again."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from prelora_ds.core.allocators import THRESHOLD, select
from prelora_ds.core.duration import Duration
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan

ImportanceKind = Literal["forward", "random"]


@dataclass(frozen=True)
class Selection:
    """Which adapters of a phase train, and when others are chosen.

    choose: a rule of `prelora_ds.core.allocators`.
    k, share: its parameter.
    every: how often the adapters are chosen, from the start of the phase; None with ``once_at``.
    once_at: when they are chosen for the second and last time.
    importance: ``forward`` is the sum over training samples of the L2 norm of a linear's whole output; ``random`` takes
        random numbers in its place, as a control.
    cut_backward: whether everything that the model defines before the lowest chosen adapter stops training as well, so
        that the backward pass ends there.
    """

    choose: str
    k: int | None = None
    share: float | None = None
    every: Duration | None = None
    once_at: Duration | None = None
    importance: ImportanceKind = "forward"
    cut_backward: bool = False


def candidates(plan: Plan, layout: Layout) -> frozenset[str]:
    """Return the adapters of which a leaf can train."""
    return frozenset(path for name, (path, _) in plan.leaves(layout).items() if name in plan.trainable)


def first_choice(selection: Selection, plan: Plan, layout: Layout, seed: int) -> frozenset[str]:
    """Draw adapters with equal probability, because no importance is known at the start of a phase."""
    return select("random", dict.fromkeys(candidates(plan, layout), 1.0), k=selection.k, share=selection.share,
                  rng=random.Random(f"{seed}/{plan.phase}/0"))


def next_choice(selection: Selection, plan: Plan, layout: Layout, seed: int, number: int,
                importance: Mapping[str, float], updates: Mapping[str, int]) -> frozenset[str]:
    """Choose adapters by what was measured since the start of the phase.

    number: how many choices were made before. importance, updates: adapter -> its sum, and its optimizer steps.
    """
    rng = random.Random(f"{seed}/{plan.phase}/{number}")
    among = sorted(candidates(plan, layout))
    if selection.importance == "random":
        importance = {path: rng.random() for path in among}
    else:
        importance = {path: importance[path] for path in among}
    k = None if selection.choose == THRESHOLD else selection.k
    return select(selection.choose, importance, k=k, share=selection.share, updates=updates, rng=rng)


def with_active(plan: Plan, layout: Layout, chosen: frozenset[str], *, cut_backward: bool) -> Plan:
    """Return ``plan`` with only the adapters ``chosen`` training, and whatever else it trains."""
    idle = {name for name, (path, _) in plan.leaves(layout).items() if path not in chosen}
    active = plan.trainable - idle
    if cut_backward:
        layer_of = {path: layer for layers in layout.targets.values() for layer, path in layers.items()}
        active -= layout.before(min(layer_of[path] for path in chosen))
    return replace(plan, active=None if active == plan.trainable else active)


def active_adapters(plan: Plan, layout: Layout) -> frozenset[str]:
    """Return the adapters of which a leaf trains now."""
    training = plan.training()
    return frozenset(path for name, (path, _) in plan.leaves(layout).items() if name in training)
