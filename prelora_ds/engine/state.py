"""An engine's state on the host as slices per rank: exported, copied, and gathered again.

Each rank holds 1/world of everything. restore.py writes it into a new engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm

from prelora_ds.engine.fragments import (
    Fragment,
    adam_state,
    fragments,
    trained_names,
)
from prelora_ds.engine.optimizer import KEPT, inner_optimizer
from prelora_ds.model.adapters import dense_weights, fp32_weights
from prelora_ds.model.families import named_parameters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import nn


@dataclass
class Slice:
    """Elements [start, start + len) of a flattened parameter.

    value: of a trainable parameter its fp32 master; of a frozen one its value, in BF16, or in fp32
        if a merged LoRA linear or `Engine.parked` keeps it so.
    moments: the Adam moments by name, and with them what else `KEPT` contains, fp32; empty for a
        frozen parameter.
    """

    start: int
    value: torch.Tensor
    moments: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class EngineState:
    """The state that one rank carries from engine to engine.

    slices: this rank's part of each parameter; absent if other ranks hold all of it.
    adam_steps: for every parameter with Adam moments, its number of Adam steps; the same on all
        ranks.
    buffers: the module's buffers, persistent or not (a new module does not have their values).
    """

    slices: dict[str, Slice]
    adam_steps: dict[str, int] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def host_bytes(self) -> int:
        """Return the bytes of all slices."""
        return sum(t.nbytes for s in self.slices.values() for t in (s.value, *s.moments.values()))


def even_share(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return this rank's share [start, stop) of ``numel`` replicated elements."""
    return numel * rank // world_size, numel * (rank + 1) // world_size


def initial_state(module: nn.Module, rank: int, world_size: int) -> EngineState:
    """Return the state of a newly built fp32 module that is the same on all ranks."""
    slices = {}
    for name, p in named_parameters(module).items():
        start, stop = even_share(p.numel(), rank, world_size)
        slices[name] = Slice(start, p.detach().float().view(-1)[start:stop].clone())
    return EngineState(slices, buffers=_buffers(module))


def export_state(engine: DeepSpeedEngine) -> EngineState:
    """Move this rank's part of the state to the host. ``engine`` cannot be used afterwards.

    Each of the optimizer's tensors is freed as soon as it is copied, so engine and export together
    never hold more than the engine did, plus one tensor.
    """
    return _collect(engine, _host_copy, done=lambda tensor: tensor.untyped_storage().resize_(0))


def copy_state(
    engine: DeepSpeedEngine,
    *,
    frozen: bool = True,
    parked: Mapping[str, Slice] | None = None,
    reuse: EngineState | None = None,
) -> EngineState:
    """Copy the state that `export_state` would return, and leave ``engine`` as it is.

    frozen: False leaves out the frozen parameters.
    parked: fp32 slices that replace the BF16 ones of frozen parameters (`Engine.parked`).
    reuse: an earlier copy that is no longer needed. Its memory is written again, because writing to
        already mapped memory is much faster than faulting in new pages.
    """
    free: dict[tuple[torch.dtype, int], list[torch.Tensor]] = {}
    for old in () if reuse is None else reuse.slices.values():
        for tensor in (old.value, *old.moments.values()):
            free.setdefault((tensor.dtype, tensor.numel()), []).append(tensor)

    def to_host(part: torch.Tensor) -> torch.Tensor:
        reusable = free.get((part.dtype, part.numel()))
        return reusable.pop().copy_(part) if reusable else _host_copy(part)

    state = _collect(engine, to_host, frozen=frozen)
    if frozen:
        state.slices |= {
            name: Slice(s.start, to_host(s.value)) for name, s in (parked or {}).items()
        }
    return state


@torch.no_grad()
def _collect(
    engine: DeepSpeedEngine,
    to_host: Callable[[torch.Tensor], torch.Tensor],
    *,
    done: Callable[[torch.Tensor], object] = lambda _: None,
    frozen: bool = True,
) -> EngineState:
    """Pass each part that this rank holds to ``to_host``, and return the results as a state.

    ``done(flat)`` is called once all parts of a flat tensor are copied.
    """
    rank, world = comm.get_rank(), comm.get_world_size()
    inner = adam_state(engine)
    adam_steps_of = inner_optimizer(engine).steps
    by_flat: dict[int, list[Fragment]] = {}
    for fragment in fragments(engine):
        by_flat.setdefault(id(fragment.flat), []).append(fragment)

    slices: dict[str, Slice] = {}
    adam_steps: dict[str, int] = {}
    replicated = engine.zero_optimization_stage() == 0
    for flat, names in trained_names(engine):
        moments = {key: inner[flat][key] for key in KEPT if key in inner.get(flat, {})}
        tensors = {"value": flat} | moments
        if "exp_avg" in tensors:
            adam_steps |= {name: adam_steps_of[name] for name in names}
        for key, tensor in tensors.items():
            for f in by_flat.get(id(flat), ()):
                start, stop = f.start, f.stop
                if replicated:
                    start, stop = even_share(f.stop, rank, world)
                part = to_host(f.of(tensor)[start - f.start : stop - f.start])
                if key == "value":
                    slices[f.name] = Slice(start, part)
                else:
                    slices[f.name].moments[key] = part
            done(tensor)

    if frozen:
        slices |= frozen_slices(engine)
    return EngineState(slices, adam_steps, _buffers(engine.module))


def reset_moments(state: EngineState) -> None:
    """Let all Adam moments and steps begin at zero, as those of parameters that have never trained."""
    for part in state.slices.values():
        part.moments = {}
    state.adam_steps.clear()


def frozen_slices(
    engine: DeepSpeedEngine, *, without: Collection[str] = ()
) -> dict[str, Slice]:
    """Copy this rank's part of each frozen parameter, in fp32 if the module has that, otherwise in BF16.

    without: parameters that are left out.

    A quantised weight has the BF16 value with which the engine computes.
    """
    trained = inner_optimizer(engine).steps
    fp32 = fp32_weights(engine.module)
    frozen = chain(named_parameters(engine.module).items(), dense_weights(engine.module))
    return {
        name: _frozen_slice(fp32.get(name, p), comm.get_rank(), comm.get_world_size())
        for name, p in frozen
        if name not in trained and name not in without
    }


def _host_copy(part: torch.Tensor) -> torch.Tensor:
    return part.to("cpu", copy=True)


def _frozen_slice(p: torch.Tensor, rank: int, world: int) -> Slice:
    """Return this rank's part of a frozen parameter ``p``, or of the fp32 tensor given instead."""
    if hasattr(p, "ds_tensor"):
        start, stop = _span(p, rank, world)
        return Slice(start, p.ds_tensor.detach()[: stop - start].to("cpu", copy=True))
    return share_of(p, p, rank, world)


def share_of(p: torch.Tensor, full: torch.Tensor, rank: int, world: int) -> Slice:
    """Return this rank's part of ``full``, the full value of the frozen parameter ``p``."""
    start, stop = _span(p, rank, world)
    return Slice(start, full.detach().view(-1)[start:stop].to("cpu", copy=True))


def _span(p: torch.Tensor, rank: int, world: int) -> tuple[int, int]:
    """Return this rank's share [start, stop) of a frozen parameter.

    At stage 3 it is DeepSpeed's partition, otherwise an even share.
    """
    if not hasattr(p, "ds_tensor"):
        return even_share(p.numel(), rank, world)
    partitioned: Any = p  # with the attributes that DeepSpeed gives it
    partition = partitioned.ds_tensor.ds_numel
    start = min(partition * rank, partitioned.ds_numel)
    return start, min(start + partition, partitioned.ds_numel)


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.detach().to("cpu", copy=True) for name, b in module.named_buffers()}


def gather_full(
    state: EngineState, name: str, key: str, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Return the full fp32 tensor ``key`` of ``name`` on all ranks. Collective.

    key: "value" or a moment.
    """
    part = state.slices.get(name)
    if part is None:
        return gather_parts(0, None, shape, device)
    return gather_parts(
        part.start, part.value if key == "value" else part.moments[key], shape, device
    )


def gather_parts(
    start: int, part: torch.Tensor | None, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Return the full fp32 tensor of which each rank holds a ``part`` from ``start`` on. Collective.

    part: None if other ranks hold all of it. The parts are disjoint, so summing their bits as
        integers combines them exactly, including negative zeros and NaN payloads.
    """
    full = torch.zeros(math.prod(shape), device=device)
    if part is not None:
        full[start : start + part.numel()].copy_(part)
    comm.all_reduce(full.view(torch.int32))
    return full.view(shape)
