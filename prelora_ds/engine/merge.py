"""Merge adapters into the weights that they adapt (ReLoRA).

A merge adds s B A to the fp32 value of each frozen weight. That value is kept apart from the BF16 weight: as slices in
host memory (`Engine.parked`), or in full in a linear that trains merged. Then A and B begin again at first values.

Each rank multiplies only the rows of B that its slice touches, in float64, and rounds the sum once to fp32. So the
result has the same bits at every world size, on a live engine (`merge_adapters`) and on an exported state
(`fold_adapters`). What DoRA adds to a row depends on all of the row, so `fold_adapters` gathers its weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from deepspeed import comm

from prelora_ds.core.adapters import AdapterSpec, Shape, kind_of
from prelora_ds.core.layout import Layout
from prelora_ds.core.merge import PROBES, Reset
from prelora_ds.core.plan import Plan
from prelora_ds.engine.fragments import Fragment, adam_state, fragments
from prelora_ds.engine.measure import logits_of, relative_change
from prelora_ds.engine.optimizer import MOMENTS, inner_optimizer
from prelora_ds.engine.restore import write_bf16
from prelora_ds.engine.runtime import device
from prelora_ds.engine.state import EngineState, Slice, gather_full, gather_parts
from prelora_ds.engine.values import full_part
from prelora_ds.model.adapters import fp32_weights, half_of, initial_adapter_value, refresh_adapters
from prelora_ds.model.families import named_parameters

if TYPE_CHECKING:
    from prelora_ds.engine.engine import Engine


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    reset: how many elements of the adapters had their moments reset.
    elements: how many elements of the adapters train.
    output_change: the root mean square change of the logits of random images, relative to that of the logits. NaN for
        a model that `Engine.make_module` returns, because what its inputs look like is not known.
    """

    reset: int
    elements: int
    output_change: float

    @property
    def reset_share(self) -> float:
        return self.reset / self.elements


@torch.no_grad()
def merge_adapters(engine: Engine, plan: Plan, reset: Reset) -> MergeReport:
    """Merge the adapters of ``engine`` between two steps, and let them begin again. Collective.

    plan: the engine's plan in its next cycle.

    Raises RuntimeError on every rank if not as many moments were reset as ``reset`` asks for.
    """
    takes_images = engine.make_module is None
    before = _logits_of_probes(engine) if takes_images else None
    _merge_weights(engine)
    done, elements = _restart_adapters(engine, plan, reset)
    refresh_adapters(engine.module, inactive=True)
    engine.plan = plan

    if before is None:
        return MergeReport(done, elements, math.nan)
    return MergeReport(done, elements, relative_change(before, _logits_of_probes(engine)))


def _merge_weights(engine: Engine) -> None:
    ds = engine.ds
    shapes = engine.plan.parameters(engine.layout)
    parameters = named_parameters(ds.module)
    fp32 = fp32_weights(ds.module)
    held = {fragment.name: fragment for fragment in fragments(ds)}
    for path, spec in engine.plan.adapters.items():
        name = f"{path}.weight"
        values = {leaf: _full_master(engine, held.get(f"{path}.{leaf}"), f"{path}.{leaf}", shape)
                  for leaf, shape in kind_of(spec).parameters(shapes[name], spec).items()}
        if name in fp32:
            add_product(Slice(0, fp32[name].view(-1)), shapes[name], values, spec)
            continue
        part = engine.parked[name]
        add_product(part, shapes[name], values, spec)
        _write_slice(parameters[name], part, shapes[name], ds.device)


def _restart_adapters(engine: Engine, plan: Plan, reset: Reset) -> tuple[int, int]:
    """Write first values into all adapters and reset their moments and Adam steps.

    Returns how many elements had their moments reset, and how many train, on all ranks.
    """
    ds = engine.ds
    shapes = plan.parameters(engine.layout)
    leaves = plan.leaves(engine.layout)
    parameters = named_parameters(ds.module)
    held = {fragment.name: fragment for fragment in fragments(ds)}
    moments = adam_state(ds)
    steps = inner_optimizer(ds).steps
    replicated = ds.zero_optimization_stage() == 0

    wanted = 0
    elements = 0
    done = 0
    for name, (path, _) in leaves.items():
        first = initial_adapter_value(name, shapes[name], plan, leaves).to(ds.device)
        write_bf16(parameters[name], first)
        if name not in steps:
            continue  # the leaf does not train
        fragment = held.get(name)
        exp_avg = _first_moment(engine, fragment, shapes[name], reset)
        gone = reset_mask(name, shapes[name], plan.adapters[path].seed, plan.cycle, reset, exp_avg)
        steps[name] = 0
        wanted += reset.count(gone.numel())
        elements += gone.numel()
        if fragment is None:
            continue

        mine = slice(fragment.start, fragment.stop)
        fragment.of(fragment.flat).copy_(first.view(-1)[mine])
        state = moments.get(fragment.flat, {})
        zeroed = gone[mine]
        for part in (fragment.of(state[key]) for key in MOMENTS if key in state):
            part.masked_fill_(gone[mine].to(part.device), 0.0)
            zeroed = zeroed & (part == 0.0).cpu()
        if not replicated or comm.get_rank() == 0:
            done += int(zeroed.sum())

    total = torch.tensor(done, device=ds.device)
    comm.all_reduce(total)
    done = int(total)
    if abs(done - wanted) > 1:
        raise RuntimeError(f"a merge reset the moments of {done:,} of {elements:,} elements, but {reset.rule} with "
                           f"share {reset.share} asks for {wanted:,}")
    return done, elements


def fold_adapters(state: EngineState, before: Plan, after: Plan, *, layout: Layout) -> None:
    """Merge the adapters of ``before`` into an exported state, and remove them from it. Collective.

    It is an edit for `transition`: the adapters of ``after``, if there are any, begin at first values.

    Raises RuntimeError on every rank if an adapted weight has no fp32 value.
    """
    check_fp32_weights(state, [f"{path}.weight" for path in before.adapters])
    shapes = before.parameters(layout)
    for path, spec in before.adapters.items():
        weight = f"{path}.weight"
        leaves = kind_of(spec).parameters(shapes[weight], spec)
        values = {leaf: gather_full(state, f"{path}.{leaf}", "value", shape, device())
                  for leaf, shape in leaves.items()}
        if kind_of(spec).can.needs_weight:
            whole = gather_full(state, weight, "value", shapes[weight], device())
            if weight in state.slices:
                _write_effective(state.slices[weight], whole, values, spec)
        elif weight in state.slices:
            add_product(state.slices[weight], shapes[weight], values, spec)
        for leaf in leaves:
            state.slices.pop(f"{path}.{leaf}", None)
            state.adam_steps.pop(f"{path}.{leaf}", None)


def check_fp32_weights(state: EngineState, names: Sequence[str]) -> None:
    """Raise RuntimeError on every rank if the state has only a BF16 value of one of the weights ``names``. Collective.

    A product that is added to a BF16 value would mostly be lost.
    """
    rounded: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(rounded, [
        name for name in names if name in state.slices and state.slices[name].value.dtype != torch.float32])
    for found in rounded:
        if found:
            raise RuntimeError(f"{found[0]} has no fp32 value, so no adapter can be merged into it")


def add_product(part: Slice, shape: Shape, values: Mapping[str, torch.Tensor], spec: AdapterSpec, *,
                without: Mapping[str, torch.Tensor] | None = None) -> None:
    """Add to ``part`` what the adapter adds to these elements of the weight.

    part: an fp32 slice of a weight of the shape [out, in].
    values: leaf -> its full value.
    without: the values of another adapter with the same scaling, whose product is subtracted.

    Products and sum are in float64, and the sum is rounded once to fp32.
    """
    start, count, width = part.start, part.value.numel(), shape[1]
    if not count:
        return
    low = start // width
    high = -(-(start + count) // width)

    def product(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
        exact = {leaf: value.double() for leaf, value in leaves.items()}
        return half_of(spec.kind).product(exact, spec, shape, slice(low, high)).view(-1)[start - low * width:][:count]

    added = product(values)
    if without is not None:
        added -= product(without)
    part.value.copy_((part.value.double() + added.to(part.value.device)).float())


def _write_effective(part: Slice, whole: torch.Tensor, values: Mapping[str, torch.Tensor], spec: AdapterSpec) -> None:
    """Write into ``part`` these elements of the weight ``whole`` with the adapter folded in, rounded once to fp32."""
    exact = {leaf: value.double() for leaf, value in values.items()}
    merged = half_of(spec.kind).effective(whole.double(), exact, spec).view(-1)
    part.value.copy_(merged[part.start : part.start + part.value.numel()])


def reset_mask(name: str, shape: Shape, seed: int, cycle: int, reset: Reset,
               exp_avg: torch.Tensor | None) -> torch.Tensor:
    """Return which elements of the flattened parameter ``name`` have their moments reset.

    The mask is the same on every rank and at every world size.

    seed: the seed of the adapter.
    exp_avg: the first moment, for ``magnitude``. Of equal elements those with the smaller index are reset first.
    """
    elements = math.prod(shape)
    count = reset.count(elements)
    mask = torch.zeros(elements, dtype=torch.bool)
    if reset.rule == "magnitude":
        assert exp_avg is not None
        return _smallest(exp_avg.abs().view(-1).cpu(), count)
    if reset.rule == "zero":
        return ~mask
    digest = hashlib.sha256(f"{seed}/{cycle}/reset/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    mask[torch.randperm(elements, generator=generator)[:count]] = True
    return mask


def _smallest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return which ``count`` elements are the smallest; of equal ones those with the smaller index come first.

    It does not sort: to sort all moments of ViT-L's adapters would take as long as the rest of a merge. numpy's
    partition takes a tenth of the time of torch's kthvalue, because it uses AVX-512 or AVX2.
    """
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    bound = float(np.partition(values.numpy(), count - 1)[count - 1])
    mask = values < bound
    equal = (values == bound).nonzero().view(-1)
    mask[equal[: count - int(mask.sum())]] = True
    return mask


def _first_moment(engine: Engine, fragment: Fragment | None, shape: Shape, reset: Reset) -> torch.Tensor | None:
    if reset.rule != "magnitude":
        return None
    moments = {} if fragment is None else adam_state(engine.ds).get(fragment.flat, {})
    part = fragment.of(moments["exp_avg"]) if fragment is not None and "exp_avg" in moments else None
    return full_part(engine, fragment, part, shape)


def _full_master(engine: Engine, fragment: Fragment | None, name: str, shape: Shape) -> torch.Tensor:
    """Return the full fp32 value of an adapter's parameter on every rank. Collective."""
    if name not in inner_optimizer(engine.ds).steps:  # it does not train, and its only value is BF16
        first = initial_adapter_value(name, shape, engine.plan, engine.plan.leaves(engine.layout))
        return first.bfloat16().float().to(engine.ds.device)
    part = None if fragment is None else fragment.of(fragment.flat)
    return full_part(engine, fragment, part, shape)


def _write_slice(p: Any, part: Slice, shape: Shape, device: torch.device) -> None:
    """Write a frozen weight, of which each rank holds an fp32 slice, into the BF16 parameter. Collective."""
    if hasattr(p, "ds_tensor") and p.data.numel() != p.ds_numel:
        p.ds_tensor.detach()[: part.value.numel()].copy_(part.value)  # the slice is this rank's partition
    else:
        write_bf16(p, gather_parts(part.start, part.value, shape, device))


def _logits_of_probes(engine: Engine) -> torch.Tensor:
    model = engine.config.model
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (PROBES, model.num_channels, model.image_size, model.image_size),
                           dtype=torch.uint8, generator=generator)
    return logits_of(engine, images)
