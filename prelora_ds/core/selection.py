"""DynaLoRA: only some adapters train at a time, and the choice is made again and again."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from prelora_ds.core.allocators import THRESHOLD, select
from prelora_ds.core.allocators.unconverged import unconverged
from prelora_ds.core.duration import Duration
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.core.switch_tests.prelora import WindowStats, layer_changes

Measured = Literal["forward", "backward"]
ImportanceKind = Literal[Measured, "random"]
UNCONVERGED = "unconverged"


@dataclass(frozen=True)
class Selection:
    """Which adapters of a phase train, and when others are chosen.

    choose: a rule of `prelora_ds.core.allocators`, or ``unconverged``.
    k, share, tau: the parameter of the rule.
    every: how often the adapters are chosen, from the start of the phase; None with ``once_at``.
    once_at: when they are chosen for the second and last time.
    importance: ``forward`` is the sum over training samples of the L2 norm of a linear's whole output; ``backward``
        is the L2 norm of the gradient of the adapter, before clipping, summed over the last steps before each choice,
        in which all adapters train; ``random`` takes random numbers in their place, as a control.
    local_rate: whether the learning rate of an adapter follows the schedule only in the steps that update the adapter.
    cut_backward: whether everything that the model defines before the lowest chosen adapter stops training as well, so
        that the backward pass ends there.
    """

    choose: str
    k: int | None = None
    share: float | None = None
    tau: float | None = None
    every: Duration | None = None
    once_at: Duration | None = None
    importance: ImportanceKind = "forward"
    local_rate: bool = False
    cut_backward: bool = False

    @property
    def measured(self) -> Measured | None:
        """The importance that training has to measure for the rule."""
        if self.choose in ("random", UNCONVERGED) or self.importance == "random":
            return None
        return self.importance


def candidates(plan: Plan, layout: Layout) -> list[str]:
    """Return the adapters of which a leaf can train, from the bottom of the model to its top."""
    trained = {path for name, (path, _) in plan.leaves(layout).items() if name in plan.trainable}
    return [path for name in layout.parameters if (path := name.removesuffix(".weight")) in trained]


def first_choice(selection: Selection, plan: Plan, layout: Layout, seed: int) -> frozenset[str]:
    """Choose adapters at the start of a phase, when nothing is measured yet.

    They are drawn with equal probability. For ``unconverged`` all of them train.
    """
    among = candidates(plan, layout)
    if selection.choose == UNCONVERGED:
        return frozenset(among)
    return select("random", dict.fromkeys(among, 1.0), k=selection.k, share=selection.share,
                  rng=random.Random(f"{seed}/{plan.phase}/0"))


def next_choice(selection: Selection, plan: Plan, layout: Layout, seed: int, number: int, *,
                importance: Mapping[str, float], updates: Mapping[str, int],
                windows: Sequence[WindowStats]) -> frozenset[str]:
    """Choose adapters by what was measured since the start of the phase.

    number: how many choices were made before.
    importance, updates: adapter -> its sum, and its optimizer steps.
    windows: the closed windows of the phase, which ``unconverged`` compares. An adapter that has left does not return,
        and none leaves before two windows have closed.
    """
    among = candidates(plan, layout)
    if selection.choose == UNCONVERGED:
        assert selection.tau is not None
        active = active_adapters(plan, layout)
        if len(windows) < 2:
            return active
        changes = _changes(layout, windows)
        return unconverged([(path, changes[path]) for path in among if path in active], selection.tau)

    rng = random.Random(f"{seed}/{plan.phase}/{number}")
    if selection.importance == "random":
        importance = {path: rng.random() for path in sorted(among)}
    else:
        importance = {path: importance[path] for path in among}
    k = None if selection.choose == THRESHOLD else selection.k
    return select(selection.choose, importance, k=k, share=selection.share, updates=updates, rng=rng)


def _changes(layout: Layout, windows: Sequence[WindowStats]) -> dict[str, float]:
    """Adapter -> how much the norm of its effective weight changed between the last two windows, in per cent."""
    changes = layer_changes(*windows[-2:])
    return {layout.targets[family][layer]: abs(change)
            for family, layers in changes.items() for layer, change in layers.items()}


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
