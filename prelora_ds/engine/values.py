"""Full fp32 values of single parameters of a live engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prelora_ds.core.adapters import Shape
from prelora_ds.engine.fragments import Fragment, fragments
from prelora_ds.engine.measure import gathered
from prelora_ds.engine.optimizer import inner_optimizer
from prelora_ds.engine.state import gather_parts
from prelora_ds.model.adapters import fp32_weights
from prelora_ds.model.families import named_parameters

if TYPE_CHECKING:
    from prelora_ds.engine.engine import Engine


class FullValues:
    """Gathers parameters of ``engine`` one at a time, between two steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shapes = engine.plan.parameters(engine.layout)
        self._parameters = named_parameters(engine.module)
        self._merged = fp32_weights(engine.module)
        self._held = {fragment.name: fragment for fragment in fragments(engine.ds)}
        self._trained = inner_optimizer(engine.ds).steps.keys()

    def of(self, name: str) -> torch.Tensor:
        """Return the full fp32 value of ``name`` on every rank, on its device. Collective.

        It is the master of a parameter that the optimizer holds. Of another one it is the fp32 value that is kept for a
        merge or for a later phase, and if there is none, its BF16 value.
        """
        engine, shape = self._engine, self._shapes[name]
        if name in self._trained:
            fragment = self._held.get(name)
            return full_part(engine, fragment, None if fragment is None else fragment.of(fragment.flat), shape)
        if name in self._merged:
            return self._merged[name]
        if name in engine.parked:
            part = engine.parked[name]
            return gather_parts(part.start, part.value, shape, engine.ds.device)
        with gathered(engine, [self._parameters[name]]) as (value,):
            return value.float()


def full_part(engine: Engine, fragment: Fragment | None, part: torch.Tensor | None, shape: Shape) -> torch.Tensor:
    """Return the full tensor of which this rank holds ``part``, at the place of ``fragment``. Collective."""
    if engine.ds.zero_optimization_stage() == 0:  # every rank holds all of it
        assert part is not None
        return part.clone().view(shape)
    return gather_parts(0 if fragment is None else fragment.start, part, shape, engine.ds.device)
