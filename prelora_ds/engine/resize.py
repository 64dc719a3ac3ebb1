"""Change the ranks of adapters that continue to train, without a change of the outputs.

An adapter that grows gets further rows of A at first values and further columns of B that are zero, so its product is
the same bit for bit. An adapter that shrinks keeps the largest singular values of its product s B A, and the rest is
added to the weight, in float64 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm

from prelora_ds.core.adapters import AdapterSpec, Shape, kind_of
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.engine.merge import add_product, check_fp32_weights
from prelora_ds.engine.optimizer import MOMENTS
from prelora_ds.engine.runtime import device
from prelora_ds.engine.state import EngineState, Slice, even_share, gather_full
from prelora_ds.model.adapters import half_of, initial_adapter_value

Values = dict[str, torch.Tensor]  # leaf -> its full tensor


def resize_adapters(state: EngineState, before: Plan, after: Plan, *, layout: Layout) -> None:
    """Give the adapters in an exported state the ranks that they have in the plan ``after``. Collective.

    It is an edit for `transition`. The Adam step of each leaf that changes is 0 again. When it grows, its elements keep
    their moments, and the further ones have none; when it shrinks, its moments are zero, because they belong to another
    basis. Adapters of equal rank are not touched.

    Raises RuntimeError on every rank if an adapter shrinks whose weight has no fp32 value.
    """
    ranks = {path: (spec.rank or 0, after.adapters[path].rank or 0) for path, spec in before.adapters.items()}
    check_fp32_weights(state, [f"{path}.weight" for path, (old, new) in ranks.items() if new < old])
    changed = [path for path, (old, new) in ranks.items() if new != old]
    for turn, path in enumerate(changed):
        old_rank, new_rank = ranks[path]
        if new_rank > old_rank:
            _grow(state, path, before, after, layout)
        else:
            _shrink(state, path, before, after, layout, computed_by=turn % comm.get_world_size())


def _grow(state: EngineState, path: str, before: Plan, after: Plan, layout: Layout) -> None:
    leaves = after.leaves(layout)
    shapes = _shapes(path, after, layout)
    for leaf, old_shape in _shapes(path, before, layout).items():
        name = f"{path}.{leaf}"
        first = initial_adapter_value(name, shapes[leaf], after, leaves).to(device())
        value = _embedded(gather_full(state, name, "value", old_shape, device()), first)
        moments = {}
        if name in state.adam_steps:
            for key in MOMENTS:
                old = gather_full(state, name, key, old_shape, device())
                moments[key] = _embedded(old, torch.zeros(shapes[leaf], device=device()))
        _replace(state, name, value, moments)


def _shrink(state: EngineState, path: str, before: Plan, after: Plan, layout: Layout, *, computed_by: int) -> None:
    spec = before.adapters[path]
    old = {leaf: gather_full(state, f"{path}.{leaf}", "value", shape, device())
           for leaf, shape in _shapes(path, before, layout).items()}
    new = _shrunk(old, after.adapters[path], _shapes(path, after, layout), computed_by)

    weight = f"{path}.weight"
    if weight in state.slices:
        part, shape = state.slices[weight], layout.parameters[weight]
        add_product(part, shape, old, spec, without=new)
    for leaf, value in new.items():
        moments = {}
        if f"{path}.{leaf}" in state.adam_steps:
            moments = {key: torch.zeros_like(value) for key in MOMENTS}
        _replace(state, f"{path}.{leaf}", value, moments)


def _shrunk(values: Values, spec: AdapterSpec, shapes: dict[str, Shape], computed_by: int) -> Values:
    """Return the best approximation of the adapter ``values`` by ``spec``, in fp32, the same on every rank. Collective.

    One rank computes it, because two machines may round a decomposition differently.
    """
    if comm.get_rank() == computed_by:
        new = half_of(spec.kind).shrunk({leaf: value.double() for leaf, value in values.items()}, spec)
        new = {leaf: value.float().contiguous() for leaf, value in new.items()}
    else:
        new = {leaf: torch.empty(shape, device=device()) for leaf, shape in shapes.items()}
    for leaf in shapes:
        comm.broadcast(new[leaf], src=computed_by)
    return new


def _shapes(path: str, plan: Plan, layout: Layout) -> dict[str, Shape]:
    """Leaf -> its shape."""
    spec = plan.adapters[path]
    return dict(kind_of(spec).parameters(layout.parameters[f"{path}.weight"], spec))


def _embedded(old: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """Return ``into`` with ``old`` in its first rows and columns."""
    into[tuple(slice(n) for n in old.shape)] = old
    return into


def _replace(state: EngineState, name: str, value: torch.Tensor, moments: dict[str, torch.Tensor]) -> None:
    """Put this rank's share of a full ``value`` and its ``moments`` into the state, with an Adam step of 0."""
    start, stop = even_share(value.numel(), comm.get_rank(), comm.get_world_size())

    def share(full: torch.Tensor) -> Any:
        return full.view(-1)[start:stop].to("cpu", copy=True)

    state.slices[name] = Slice(start, share(value), {key: share(full) for key, full in moments.items()})
    if name in state.adam_steps:
        state.adam_steps[name] = 0
