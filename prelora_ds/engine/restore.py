"""Write the slices of all ranks into a new engine, one tensor at a time, and check the result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed import comm

from prelora_ds.core.adapters import AdapterSpec, kind_of
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.engine.fragments import adam_state, fragments, trained_names, updated_weights
from prelora_ds.engine.optimizer import inner_optimizer
from prelora_ds.engine.state import EngineState, Slice, gather_full, share_of
from prelora_ds.model.adapters import (
    fp32_weights,
    initial_adapter_value,
    quantised_linears,
    refresh_adapters,
)
from prelora_ds.model.families import named_parameters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import nn


@torch.no_grad()
def restore_state(
    engine: DeepSpeedEngine,
    plan: Plan,
    layout: Layout,
    state: EngineState,
    *,
    parked: frozenset[str] = frozenset(),
) -> dict[str, Slice]:
    """Write ``state`` into a newly built engine. Collective.

    BF16 and quantised weights, fp32 masters, Adam moments and steps are written, and ``state`` is
    consumed. Parameters of the plan that are not in the state are adapters and get their initial value.

    Returns this rank's fp32 slices of the frozen parameters ``parked``, which the ranks share like
    exported frozen parameters. Weights that the module itself keeps in fp32 are not among them.

    Raises RuntimeError on every rank if the state does not fit the plan, or if DeepSpeed's masters
    do not match the weights afterwards.
    """
    in_state = _check_fits(engine, plan, layout, state)
    parameters = named_parameters(engine.module)
    inner = adam_state(engine)
    inner.clear()  # DeepSpeed 0.19 took one step on zero gradients at stage 0
    fragment_of: dict[str, Any] = {f.name: f for f in fragments(engine)}
    optimizer = inner_optimizer(engine)
    steps = optimizer.steps
    for flat, names in trained_names(engine):
        flat.detach().zero_()  # padding included
        steps |= {name: state.adam_steps.get(name, 0) for name in names}
        # Moments can exist at step 0: the name was not active yet, or its steps were reset.
        if any(name in state.adam_steps for name in names):
            inner[flat] = {key: torch.zeros_like(flat.detach()) for key in optimizer.keys_of(names)}

    fp32 = fp32_weights(engine.module)
    quantised = quantised_linears(engine.module)
    leaves = plan.leaves(layout)
    parked_slices: dict[str, Slice] = {}
    for name, shape in plan.parameters(layout).items():
        if name in in_state:
            full = gather_full(state, name, "value", shape, engine.device)
        else:
            # A weight comes before the leaves of its adapter, so it is written already. Kinds that
            # need it have no quantised ones.
            weight = parameters.get(f"{leaves[name][0]}.weight")
            with _whole(weight, plan.adapters[leaves[name][0]]) as written:
                full = initial_adapter_value(name, shape, plan, leaves, written).to(engine.device)
        if name in quantised:
            quantised[name].write_quantised(full)
        else:
            write_bf16(parameters[name], full)
        if name in parked and name not in fp32:
            parked_slices[name] = share_of(
                parameters.get(name, full), full, comm.get_rank(), comm.get_world_size()
            )
        if name in fp32:
            fp32[name].copy_(full)

        fragment = fragment_of.get(name)
        if fragment is not None:
            fragment.of(fragment.flat).copy_(full.view(-1)[fragment.start : fragment.stop])
        if name in plan.trainable and name in state.adam_steps:
            for key in optimizer.keys_of([name]):
                full = gather_full(state, name, key, shape, engine.device)
                if fragment is not None:
                    moment = fragment.of(inner[fragment.flat][key])
                    moment.copy_(full.view(-1)[fragment.start : fragment.stop])
        state.slices.pop(name, None)

    refresh_adapters(engine.module, inactive=True)
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(state.buffers[name])
    check_masters(engine)
    return parked_slices


@contextlib.contextmanager
def _whole(weight: nn.Parameter | None, spec: AdapterSpec) -> Iterator[torch.Tensor | None]:
    """Yield the whole BF16 weight of a linear if the first values of its adapter need it. Then it is collective."""
    if weight is None or not kind_of(spec).can.needs_weight:
        yield None
        return
    with deepspeed.zero.GatheredParameters([weight]):  # does nothing below stage 3
        yield weight.data


def _check_fits(engine: DeepSpeedEngine, plan: Plan, layout: Layout, state: EngineState) -> set[str]:
    """Check that ``state`` fits ``plan``. Collective.

    Returns the names of which any rank holds a slice.

    Restoring takes one collective per tensor, and an error on one rank would leave the others
    waiting in it. Therefore everything is checked before, with the data of all ranks. Raises the
    same RuntimeError on every rank.
    """
    spans = {
        name: (
            s.start,
            s.value.numel(),
            *map(len, s.moments.values()),
        )
        for name, s in state.slices.items()
        if s.value.numel()
    }
    buffers = {name: tuple(b.shape) for name, b in state.buffers.items()}
    ranks: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(ranks, (spans, dict(state.adam_steps), buffers))

    shapes = plan.parameters(layout)
    in_state = {name for spans, _, _ in ranks for name in spans}
    problems = [
        f"{name} is not a parameter of the plan" for name in sorted(in_state - shapes.keys())
    ]
    problems += [f"{name} is missing" for name in layout.parameters if name not in in_state]
    for name in (name for name in shapes if name in in_state):  # in the same order on all ranks
        spans_of_name = [spans[name] for spans, _, _ in ranks if name in spans]
        keys = inner_optimizer(engine).keys_of([name]) if name in state.adam_steps else ()
        problems += _span_problems(name, math.prod(shapes[name]), spans_of_name, moments=len(keys))
    if any(steps != ranks[0][1] for _, steps, _ in ranks):
        problems.append("the ranks hold different Adam steps")
    expected = {name: tuple(b.shape) for name, b in engine.module.named_buffers()}
    problems += [
        f"rank {rank} holds the buffers {exported}, but the module has {expected}"
        for rank, (_, _, exported) in enumerate(ranks)
        if exported != expected
    ]

    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise RuntimeError(
            f"the state does not fit the plan of phase {plan.phase}: "
            f"{'; '.join(problems[:5])}{more}"
        )
    return in_state


def _span_problems(
    name: str, numel: int, spans: list[tuple[int, ...]], *, moments: int
) -> list[str]:
    """Return what is wrong with the slices that the ranks hold of one parameter.

    spans: per rank that holds a slice, (start, elements, elements of each moment).
    moments: how many moments there have to be.
    """
    reached = 0
    for start, length, *_ in sorted(spans):
        if start != reached:
            low, high = sorted((start, reached))
            return [f"elements {low} to {high} of {name} are missing or held twice"]
        reached += length
    if reached != numel:
        return [f"{name} has {reached:,} elements in the state but {numel:,} in the plan"]
    if any(found != [length] * moments for _, length, *found in spans):
        return [f"the Adam moments of {name} do not match its Adam step"]
    return []


def check_masters(engine: DeepSpeedEngine) -> None:
    """Compare each weight bitwise with the master that DeepSpeed overwrites it from. Collective.

    A master at the wrong position would be trained and silently written into another weight at the
    first step. Raises the same RuntimeError on every rank.
    """
    wrong = sum(
        int((weight.view(torch.int16) != master.to(weight.dtype).view(torch.int16)).sum())
        for weight, master in updated_weights(engine)
    )
    ranks: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(ranks, wrong)
    if any(ranks):
        raise RuntimeError(
            f"{ranks} elements of the weights, by rank, differ from their fp32 masters rounded "
            f"to BF16: fragments.py does not support DeepSpeed {deepspeed.__version__}"
        )


def write_bf16(p: nn.Parameter, full: torch.Tensor) -> None:
    """Write ``full`` into the BF16 parameter, at stage 3 into this rank's partition of it."""
    if hasattr(p, "ds_tensor"):
        partitioned: Any = p  # with the attributes that DeepSpeed gives it
        start = partitioned.ds_tensor.ds_numel * comm.get_rank()
        part = full.view(-1)[start : start + partitioned.ds_tensor.ds_numel]
        partitioned.ds_tensor.detach()[: part.numel()].copy_(part)
        partitioned.ds_tensor.detach()[
            part.numel() :
        ].zero_()  # padding, uninitialized in DeepSpeed 0.19
        if p.data.numel() == partitioned.ds_numel:  # small parameters stay gathered
            p.data.copy_(full)
    else:
        p.data.copy_(full)
