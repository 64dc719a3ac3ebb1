"""Where a rank's part of each parameter lies inside DeepSpeed's optimizers.

DeepSpeed 0.19 has four optimizer wrappers, each with its own flat buffers. Export and restore see fragments only;
beside this file, census.py knows the buffers by name, in order to count them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed import comm
from torch import nn

from prelora_ds.model.families import named_parameters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a flattened parameter, held by this rank's optimizer at ``flat[offset:]``.

    flat: the tensor the inner optimizer steps, fp32, on the offload device if there is one.
    """

    name: str
    start: int
    stop: int
    flat: torch.Tensor
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This fragment's elements of ``tensor``, which is laid out as ``flat`` is (a master, a moment)."""
        return tensor.detach().view(-1)[self.offset: self.offset + self.stop - self.start]


def fragments(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    """This rank's fragments of all parameters that train, in the optimizer's order.

    At stage 0 every rank holds every parameter whole, at stages 1 to 3 the fragments of all ranks are disjoint.
    """
    names = {id(p): name for name, p in named_parameters(engine.module).items()}
    optimizer: Any = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        yield from _stage3_fragments(optimizer, names)
    elif hasattr(optimizer, "fp32_groups"):
        for bit16_group, fp32_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for param, master in zip(bit16_group, fp32_group, strict=True):
                yield Fragment(names[id(param)], 0, param.numel(), master, 0)
    else:
        groups = zip(flat_masters(engine), _own_partitions(optimizer), bit16_groups(engine), strict=True)
        for flat, partition, group in groups:
            for param in group:
                yield from _flat_fragment(names[id(param)], param, partition, flat)


def _own_partitions(optimizer: Any) -> list[torch.Tensor]:
    """The 16-bit partition of each flat group that this rank's optimizer updates (stages 1 and 2)."""
    for attribute in ("parallel_partitioned_bit16_groups", "bf16_partitioned_groups"):
        if hasattr(optimizer, attribute):
            return [partitions[comm.get_rank()] for partitions in getattr(optimizer, attribute)]
    raise _unknown(optimizer)


def _flat_fragment(name: str, param: nn.Parameter, partition: torch.Tensor, flat: torch.Tensor) -> Iterator[Fragment]:
    # The parameter's own address says where it lies. DeepSpeed 0.19's `_hp_mapping` counts in the order of the
    # module, which is not the order in memory under round_robin_gradients and parameter_alignment.
    if param.untyped_storage().data_ptr() != partition.untyped_storage().data_ptr():
        raise RuntimeError(f"{name} does not lie in the flat buffer of its optimizer group")
    offset = (param.data_ptr() - partition.data_ptr()) // param.element_size()
    start, stop = max(0, -offset), min(param.numel(), partition.numel() - offset)
    if start < stop:  # else the whole parameter lies with other ranks
        yield Fragment(name, start, stop, flat, offset + start)


def _stage3_fragments(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for group in optimizer.fp16_groups:
        for param in group:
            index, offset, partition = optimizer.grad_position[optimizer.get_param_id(param)]
            start = partition * optimizer._get_param_partition_rank(param)
            stop = min(start + partition, param.ds_numel)  # the last partition is padded
            if start < stop:
                yield Fragment(names[id(param)], start, stop, optimizer.fp32_partitioned_groups_flat[index], offset)


def bit16_groups(engine: DeepSpeedEngine) -> list[list[nn.Parameter]]:
    """The module's parameters that train, by the optimizer's groups (at stage 3: sub-groups)."""
    optimizer: Any = engine.optimizer
    for attribute in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    raise _unknown(optimizer)


def trained_names(engine: DeepSpeedEngine) -> list[tuple[torch.Tensor, list[str]]]:
    """Each flat master with the names of all parameters in its group, also of those that lie with other ranks."""
    names = {id(p): name for name, p in named_parameters(engine.module).items()}
    groups = bit16_groups(engine)
    if engine.zero_optimization_stage() == 0:
        groups = [[p] for group in groups for p in group]
    return [(flat, [names[id(p)] for p in group]) for flat, group in zip(flat_masters(engine), groups, strict=True)]


def flat_masters(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """The fp32 tensors that the inner optimizer steps on this rank."""
    optimizer: Any = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        return [master for group in optimizer.fp32_groups for master in group]
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    raise _unknown(optimizer)


def _unknown(optimizer: object) -> RuntimeError:
    return RuntimeError(f"{type(optimizer).__name__} of DeepSpeed {deepspeed.__version__} is not known to fragments.py")


def updated_weights(engine: DeepSpeedEngine) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(16-bit tensor, flat master): what DeepSpeed overwrites at each step on this rank, and what it copies there.

    At stage 3 the copies of small parameters that stay gathered on every rank come last, with the partition that they
    are gathered from.
    """
    optimizer: Any = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        yield from zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
        for p in engine.module.parameters():
            if p.data.numel() == p.ds_numel:
                start = p.ds_tensor.ds_numel * comm.get_rank()
                gathered = p.data.view(-1)[start: start + p.ds_tensor.ds_numel]
                yield gathered, p.ds_tensor.view(-1)[: gathered.numel()]
    elif hasattr(optimizer, "fp32_groups"):
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(weights, masters, strict=True)
    else:
        yield from zip(_own_partitions(optimizer), flat_masters(engine), strict=True)


def adam_state(engine: DeepSpeedEngine) -> dict[torch.Tensor, dict[str, Any]]:
    """The inner optimizer's state: flat master -> exp_avg, exp_avg_sq, step."""
    state: dict[torch.Tensor, dict[str, Any]] = engine.optimizer.optimizer.state
    return state
