"""Exported state: each rank's slices of every parameter, on the host; and its way into a new engine.

A rank holds 1/world of everything. Restoring assembles one tensor of one parameter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed import comm

from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.engine.fragments import Fragment, adam_state, fragments, trained_names, updated_weights
from prelora_ds.engine.optimizer import MOMENTS, inner_optimizer
from prelora_ds.model.adapters import first_value, folded_bases
from prelora_ds.model.adapters.lora import merge_bases
from prelora_ds.model.families import named_parameters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import nn


@dataclass
class Slice:
    """Elements [start, start + len) of a flattened parameter: fp32 master and moments, or the value if frozen
    (bf16; fp32 where a LoRA linear keeps a base)."""

    start: int
    value: torch.Tensor
    moments: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class EngineState:
    """What one rank carries from engine to engine.

    slices: this rank's part of each parameter (absent where other ranks hold it all).
    adam_steps: for every parameter with Adam moments, the steps they have seen; the same on all ranks.
    buffers: the module's buffers, persistent or not (a fresh module has none of their values).
    """

    slices: dict[str, Slice]
    adam_steps: dict[str, int] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def host_bytes(self) -> int:
        """Bytes of the slices."""
        return sum(t.nbytes for s in self.slices.values() for t in (s.value, *s.moments.values()))


def even_share(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """This rank's [start, stop) of ``numel`` elements that all ranks hold alike."""
    return numel * rank // world_size, numel * (rank + 1) // world_size


def initial_state(module: nn.Module, rank: int, world_size: int) -> EngineState:
    """The state of a freshly built fp32 module that is the same on all ranks."""
    slices = {}
    for name, p in named_parameters(module).items():
        start, stop = even_share(p.numel(), rank, world_size)
        slices[name] = Slice(start, p.detach().float().view(-1)[start:stop].clone())
    return EngineState(slices, buffers=_buffers(module))


def export_state(engine: DeepSpeedEngine) -> EngineState:
    """Move this rank's part of the state to the host, tensor by tensor, leaving ``engine`` unusable.

    The optimizer's storage is given back as it is copied, so engine and export together never hold more than the
    engine did, plus one tensor.
    """
    return _collect(engine, _host_copy, done=lambda tensor: tensor.untyped_storage().resize_(0))


def copy_state(engine: DeepSpeedEngine, *, frozen: bool = True, parked: Mapping[str, Slice] | None = None,
               reuse: EngineState | None = None) -> EngineState:
    """The same as `export_state` gives, and ``engine`` continues; without ``frozen`` only what trains.

    parked: fp32 slices that take the place of frozen BF16 ones (`Engine.parked`).

    reuse: a former copy that is needed no more; memory that the system has already given is many times faster to
    write than fresh pages.
    """
    free: dict[tuple[torch.dtype, int], list[torch.Tensor]] = {}
    for old in () if reuse is None else reuse.slices.values():
        for tensor in (old.value, *old.moments.values()):
            free.setdefault((tensor.dtype, tensor.numel()), []).append(tensor)

    def to_host(part: torch.Tensor) -> torch.Tensor:
        spare = free.get((part.dtype, part.numel()))
        return spare.pop().copy_(part) if spare else _host_copy(part)

    state = _collect(engine, to_host, frozen=frozen)
    if frozen:
        state.slices |= {name: Slice(s.start, to_host(s.value)) for name, s in (parked or {}).items()}
    return state


@torch.no_grad()
def _collect(engine: DeepSpeedEngine, to_host: Callable[[torch.Tensor], torch.Tensor], *,
             done: Callable[[torch.Tensor], object] = lambda _: None, frozen: bool = True) -> EngineState:
    """``to_host`` of each part that is this rank's; ``done`` is called with each flat tensor when its parts are."""
    rank, world = comm.get_rank(), comm.get_world_size()
    inner, own_steps = adam_state(engine), inner_optimizer(engine).steps
    trained = trained_names(engine)
    by_flat: dict[int, list[Fragment]] = {}
    for fragment in fragments(engine):
        by_flat.setdefault(id(fragment.flat), []).append(fragment)

    slices: dict[str, Slice] = {}
    adam_steps: dict[str, int] = {}
    replicated = engine.zero_optimization_stage() == 0
    for flat, names in trained:
        tensors = {"value": flat} | {key: inner[flat][key] for key in MOMENTS if key in inner.get(flat, {})}
        if "exp_avg" in tensors:
            adam_steps |= {name: own_steps[name] for name in names}
        for key, tensor in tensors.items():
            for f in by_flat.get(id(flat), ()):
                start, stop = even_share(f.stop, rank, world) if replicated else (f.start, f.stop)
                part = to_host(f.of(tensor)[start - f.start: stop - f.start])
                if key == "value":
                    slices[f.name] = Slice(start, part)
                else:
                    slices[f.name].moments[key] = part
            done(tensor)

    fp32_bases = folded_bases(engine.module)
    for name, p in named_parameters(engine.module).items() if frozen else ():
        if name not in own_steps:
            slices[name] = _frozen_slice(fp32_bases.get(name, p), rank, world)
    return EngineState(slices, adam_steps, _buffers(engine.module))


def _host_copy(part: torch.Tensor) -> torch.Tensor:
    return part.to("cpu", copy=True)


def _frozen_slice(p: torch.Tensor, rank: int, world: int) -> Slice:
    """This rank's part of a frozen parameter; ``p`` may be an fp32 tensor in its place."""
    if hasattr(p, "ds_tensor"):
        start, stop = _span(p, rank, world)
        return Slice(start, p.ds_tensor.detach()[: stop - start].to("cpu", copy=True))
    return _share(p, p, rank, world)


def _share(p: torch.Tensor, full: torch.Tensor, rank: int, world: int) -> Slice:
    """This rank's part of ``full``, the whole value of the frozen parameter ``p``."""
    start, stop = _span(p, rank, world)
    return Slice(start, full.detach().view(-1)[start:stop].to("cpu", copy=True))


def _span(p: torch.Tensor, rank: int, world: int) -> tuple[int, int]:
    """This rank's [start, stop) of a frozen parameter: DeepSpeed's partition at stage 3, else an even share."""
    if not hasattr(p, "ds_tensor"):
        return even_share(p.numel(), rank, world)
    partitioned: Any = p  # with the attributes that DeepSpeed gives it
    partition = partitioned.ds_tensor.ds_numel
    start = min(partition * rank, partitioned.ds_numel)
    return start, min(start + partition, partitioned.ds_numel)


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.detach().to("cpu", copy=True) for name, b in module.named_buffers()}


@torch.no_grad()
def restore_state(engine: DeepSpeedEngine, plan: Plan, layout: Layout, state: EngineState, *,
                  parked: frozenset[str] = frozenset()) -> dict[str, Slice]:
    """Write ``state`` into a newly built engine, consuming it: bf16 weights, fp32 masters, Adam moments and steps.

    Parameters of the plan that the state does not know are adapters and get their first value. Returns this rank's fp32
    slices of the frozen parameters ``parked``, shared out as an export shares frozen ones. Collective.

    Raises RuntimeError on every rank when the state is not one of this plan, or when the masters that DeepSpeed
    holds afterwards are not those of the weights.
    """
    known = _check_fits(engine.module, plan, layout, state)
    parameters = named_parameters(engine.module)
    inner = adam_state(engine)
    inner.clear()  # stage 0 has stepped once on zero gradients
    owned: dict[str, Any] = {f.name: f for f in fragments(engine)}
    steps = inner_optimizer(engine).steps
    for flat, names in trained_names(engine):
        flat.detach().zero_()  # padding included
        steps |= {name: state.adam_steps.get(name, 0) for name in names}
        # A step of 0 can have moments: those of a name that was not active yet, or whose steps were set back.
        if any(name in state.adam_steps for name in names):
            inner[flat] = {key: torch.zeros_like(flat.detach()) for key in MOMENTS}

    fp32_bases, leaves = folded_bases(engine.module), plan.leaves(layout)
    kept: dict[str, Slice] = {}
    for name, shape in plan.parameters(layout).items():
        full = (assemble(state, name, "value", shape, engine.device) if name in known
                else first_value(name, shape, plan, leaves).to(engine.device))
        _set_weight(parameters[name], full)
        if name in parked:
            kept[name] = _share(parameters[name], full, comm.get_rank(), comm.get_world_size())
        if name in fp32_bases:
            fp32_bases[name].copy_(full)
        fragment = owned.get(name)
        if fragment is not None:
            fragment.of(fragment.flat).copy_(full.view(-1)[fragment.start: fragment.stop])
        if name in plan.trainable and name in state.adam_steps:
            for key in MOMENTS:
                full = assemble(state, name, key, shape, engine.device)
                if fragment is not None:
                    fragment.of(inner[fragment.flat][key]).copy_(full.view(-1)[fragment.start: fragment.stop])
        state.slices.pop(name, None)
    merge_bases(engine.module, inactive=True)
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(state.buffers[name])
    check_masters(engine)
    return kept


def _check_fits(module: nn.Module, plan: Plan, layout: Layout, state: EngineState) -> set[str]:
    """The names of parameters that any rank holds a slice of. Collective.

    The walk through the parameters takes a collective for each, so whatever would stop it on one rank is looked for
    before it, with the answers of all ranks at hand. Raises the same RuntimeError on every rank.
    """
    spans = {name: (s.start, s.value.numel(), *(len(s.moments[key]) for key in MOMENTS if key in s.moments))
             for name, s in state.slices.items() if s.value.numel()}
    buffers = {name: tuple(b.shape) for name, b in state.buffers.items()}
    ranks: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(ranks, (spans, dict(state.adam_steps), buffers))

    shapes = plan.parameters(layout)
    known = {name for spans, _, _ in ranks for name in spans}
    problems = [f"{name} is not a parameter of the plan" for name in sorted(known - shapes.keys())]
    problems += [f"{name} is missing" for name in layout.parameters if name not in known]
    for name in (name for name in shapes if name in known):  # in one order on all ranks
        held = [spans[name] for spans, _, _ in ranks if name in spans]
        problems += _span_problems(name, math.prod(shapes[name]), held, has_moments=name in state.adam_steps)
    if any(steps != ranks[0][1] for _, steps, _ in ranks):
        problems.append("the ranks hold different Adam steps")
    wanted = {name: tuple(b.shape) for name, b in module.named_buffers()}
    problems += [f"rank {rank} holds the buffers {held}, and the module has {wanted}"
                 for rank, (_, _, held) in enumerate(ranks) if held != wanted]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise RuntimeError(f"the state does not fit the plan of phase {plan.phase}: {'; '.join(problems[:5])}{more}")
    return known


def _span_problems(name: str, numel: int, held: list[tuple[int, ...]], *, has_moments: bool) -> list[str]:
    """What is wrong with the (start, elements, elements of each moment) that the ranks hold of a parameter."""
    reached = 0
    for start, length, *_ in sorted(held):
        if start != reached:
            return [f"elements {min(start, reached)} to {max(start, reached)} of {name} are missing or held twice"]
        reached += length
    if reached != numel:
        return [f"{name} has {reached:,} elements in the state and {numel:,} in the plan"]
    expected = len(MOMENTS) if has_moments else 0
    if any(moments != [length] * expected for _, length, *moments in held):
        return [f"the Adam moments of {name} are not those of its Adam step"]
    return []


def check_masters(engine: DeepSpeedEngine) -> None:
    """Compare each weight with the master that DeepSpeed will overwrite it from, bitwise. Collective.

    A master at a wrong place is trained and written into another weight at the first step, without a word. Raises the
    same RuntimeError on every rank.
    """
    wrong = sum(int((weight.view(torch.int16) != master.to(weight.dtype).view(torch.int16)).sum())
                for weight, master in updated_weights(engine))
    ranks: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(ranks, wrong)
    if any(ranks):
        raise RuntimeError(f"{ranks} elements of the weights, by rank, are not their fp32 masters rounded to BF16: "
                           f"DeepSpeed {deepspeed.__version__} keeps the masters elsewhere than fragments.py looks")


def assemble(state: EngineState, name: str, key: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The whole fp32 tensor ``key`` ("value" or a moment) of parameter ``name``, on all ranks. Collective.

    The slices of the ranks are disjoint, so a sum of their bits as integers puts them together exactly, negative zeros
    and NaN payloads included.
    """
    full = torch.zeros(math.prod(shape), device=device)
    part = state.slices.get(name)
    if part is not None:
        values = part.value if key == "value" else part.moments[key]
        full[part.start: part.start + values.numel()].copy_(values)
    comm.all_reduce(full.view(torch.int32))
    return full.view(shape)


def _set_weight(p: nn.Parameter, full: torch.Tensor) -> None:
    if hasattr(p, "ds_tensor"):
        partitioned: Any = p  # with the attributes that DeepSpeed gives it
        start = partitioned.ds_tensor.ds_numel * comm.get_rank()
        part = full.view(-1)[start: start + partitioned.ds_tensor.ds_numel]
        partitioned.ds_tensor.detach()[: part.numel()].copy_(part)
        partitioned.ds_tensor.detach()[part.numel():].zero_()  # padding, which DeepSpeed 0.19 leaves as it found it
        if p.data.numel() == partitioned.ds_numel:  # small parameters stay gathered
            p.data.copy_(full)
    else:
        p.data.copy_(full)
