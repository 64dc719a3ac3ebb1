"""Where a rank's part of each parameter lies inside DeepSpeed's optimizers.

DeepSpeed 0.19 has four optimizer wrappers, each with its own flat buffers:

- stage 0: FP16_UnfusedOptimizer (runtime/fp16/unfused_optimizer.py)
- stage 1: BF16_Optimizer (runtime/bf16_optimizer.py)
- stage 2, and stage 1 with offload: DeepSpeedZeroOptimizer (runtime/zero/stage_1_and_2.py)
- stage 3: DeepSpeedZeroOptimizer_Stage3 (runtime/zero/stage3.py)

Export and restore use only fragments. The other module that knows these buffers by name is
census.py, which counts them.
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
    """Elements [start, stop) of a flattened parameter, held by this rank at ``flat[offset:]``.

    flat: the fp32 tensor that the inner optimizer updates, on the offload device if there is one.
    """

    name: str
    start: int
    stop: int
    flat: torch.Tensor
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this fragment's elements of ``tensor``, which has the layout of ``flat``."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.stop - self.start]


def fragments(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    """Yield this rank's fragments of all trainable parameters, in the optimizer's order.

    At stage 0 every rank holds every parameter in full; at stages 1 to 3 the fragments of the
    ranks are disjoint.
    """
    names = {id(p): name for name, p in named_parameters(engine.module).items()}
    optimizer: Any = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        yield from _stage3_fragments(optimizer, names)
    elif hasattr(optimizer, "fp32_groups"):
        for bit16_group, fp32_group in zip(
            optimizer.fp16_groups, optimizer.fp32_groups, strict=True
        ):
            for param, master in zip(bit16_group, fp32_group, strict=True):
                yield Fragment(names[id(param)], 0, param.numel(), master, 0)
    else:
        groups = zip(
            flat_masters(engine), _own_partitions(optimizer), bit16_groups(engine), strict=True
        )
        for flat, partition, group in groups:
            for param in group:
                yield from _flat_fragment(names[id(param)], param, partition, flat)


def _own_partitions(optimizer: Any) -> list[torch.Tensor]:
    """Return the 16-bit partition of each flat group that this rank updates (stages 1 and 2)."""
    for attribute in ("parallel_partitioned_bit16_groups", "bf16_partitioned_groups"):
        if hasattr(optimizer, attribute):
            return [partitions[comm.get_rank()] for partitions in getattr(optimizer, attribute)]
    raise _unknown(optimizer)


def _flat_fragment(
    name: str, param: nn.Parameter, partition: torch.Tensor, flat: torch.Tensor
) -> Iterator[Fragment]:
    # The position is computed from the parameter's address. DeepSpeed 0.19's `_hp_mapping` assumes
    # the order of the module, which is not the order in memory with round_robin_gradients and
    # parameter_alignment.
    if param.untyped_storage().data_ptr() != partition.untyped_storage().data_ptr():
        raise RuntimeError(f"{name} does not lie in the flat buffer of its optimizer group")
    offset = (param.data_ptr() - partition.data_ptr()) // param.element_size()
    start = max(0, -offset)
    stop = min(param.numel(), partition.numel() - offset)
    if start < stop:  # otherwise the parameter lies entirely on other ranks
        yield Fragment(name, start, stop, flat, offset + start)


def _stage3_fragments(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for group in optimizer.fp16_groups:
        for param in group:
            index, offset, partition = optimizer.grad_position[optimizer.get_param_id(param)]
            start = partition * optimizer._get_param_partition_rank(param)
            stop = min(start + partition, param.ds_numel)  # the last partition is padded
            if start < stop:
                flat = optimizer.fp32_partitioned_groups_flat[index]
                yield Fragment(names[id(param)], start, stop, flat, offset)


def gradients(engine: DeepSpeedEngine) -> Iterator[tuple[Fragment, torch.Tensor]]:
    """Yield this rank's fragments with their gradients, averaged over ranks and not clipped.

    Call it between the last backward pass and the optimizer step. At stage 3, and with offload, a
    parameter that did not require a gradient may show an old one.
    """
    optimizer: Any = engine.optimizer
    stage = engine.zero_optimization_stage()
    parameters = named_parameters(engine.module)
    groups = {id(flat): i for i, flat in enumerate(flat_masters(engine))}
    for fragment in fragments(engine):
        i = groups[id(fragment.flat)]
        if stage == 0:
            gradient = parameters[fragment.name].grad
        elif stage == 3 and optimizer.offload_optimizer:
            gradient = fragment.flat.grad
        elif stage == 3:
            p: Any = parameters[fragment.name]
            parts = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
            yield fragment, parts[p.ds_id].view(-1)[: fragment.stop - fragment.start]
            continue
        elif hasattr(optimizer, "fp32_groups_gradient_flat_partition"):
            gradient = optimizer.fp32_groups_gradient_flat_partition[i]
        elif optimizer.cpu_offload:
            gradient = optimizer.single_partition_of_fp32_groups[i].grad
        else:
            gradient = getattr(optimizer.averaged_gradients.get(i), "flat_partition", None)
        if gradient is not None:
            yield fragment, fragment.of(gradient)


def bit16_groups(engine: DeepSpeedEngine) -> list[list[nn.Parameter]]:
    """Return the trainable parameters by optimizer group (at stage 3 by sub-group)."""
    optimizer: Any = engine.optimizer
    for attribute in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    raise _unknown(optimizer)


def trained_names(engine: DeepSpeedEngine) -> list[tuple[torch.Tensor, list[str]]]:
    """Return each flat master with the names of all parameters in its group.

    These include parameters that lie entirely on other ranks.
    """
    names = {id(p): name for name, p in named_parameters(engine.module).items()}
    groups = bit16_groups(engine)
    if engine.zero_optimization_stage() == 0:
        groups = [[p] for group in groups for p in group]
    return [
        (flat, [names[id(p)] for p in group])
        for flat, group in zip(flat_masters(engine), groups, strict=True)
    ]


def flat_masters(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """Return the fp32 tensors that the inner optimizer updates on this rank."""
    optimizer: Any = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        return [master for group in optimizer.fp32_groups for master in group]
    for attribute in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    raise _unknown(optimizer)


def _unknown(optimizer: object) -> RuntimeError:
    return RuntimeError(
        f"fragments.py does not support {type(optimizer).__name__} of DeepSpeed "
        f"{deepspeed.__version__}"
    )


def updated_weights(engine: DeepSpeedEngine) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (weight, source): what DeepSpeed overwrites on this rank at each step, and from what.

    A weight is a 16-bit tensor, and its source a flat fp32 master. At stage 3 there follow the
    small parameters that stay gathered on every rank, each with the 16-bit partition that it is
    gathered from.
    """
    optimizer: Any = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        yield from zip(
            optimizer.fp16_partitioned_groups_flat,
            optimizer.fp32_partitioned_groups_flat,
            strict=True,
        )
        for p in engine.module.parameters():
            if p.data.numel() == p.ds_numel:
                start = p.ds_tensor.ds_numel * comm.get_rank()
                gathered = p.data.view(-1)[start : start + p.ds_tensor.ds_numel]
                yield gathered, p.ds_tensor.view(-1)[: gathered.numel()]
    elif hasattr(optimizer, "fp32_groups"):
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(weights, masters, strict=True)
    else:
        yield from zip(_own_partitions(optimizer), flat_masters(engine), strict=True)


def adam_state(engine: DeepSpeedEngine) -> dict[torch.Tensor, dict[str, Any]]:
    """Return the inner optimizer's state: flat master -> exp_avg, exp_avg_sq, step."""
    state: dict[torch.Tensor, dict[str, Any]] = engine.optimizer.optimizer.state
    return state
