"""Where a rank's part of each parameter lies inside DeepSpeed's optimizers.

DeepSpeed 0.19 has four optimizer wrappers, each with its own flat buffers. Export and restore see fragments only;
beside this file, census.py knows the buffers by name, in order to count them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
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
        flats = flat_masters(engine)
        for i, group in enumerate(bit16_groups(engine)):
            for param in group:
                if param._hp_mapping is not None:  # None: the whole parameter lies with other ranks
                    low, high = param._hp_mapping.lp_fragment_address, param._hp_mapping.hp_fragment_address
                    yield Fragment(names[id(param)], low.start, low.start + low.numel, flats[i], high.start)


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
    raise RuntimeError(f"{type(optimizer).__name__} of this DeepSpeed version is not known to fragments.py")


def flat_masters(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """The fp32 tensors that the inner optimizer steps on this rank."""
    optimizer: Any = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        return [master for group in optimizer.fp32_groups for master in group]
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    raise RuntimeError(f"{type(optimizer).__name__} of this DeepSpeed version is not known to fragments.py")


def adam_state(engine: DeepSpeedEngine) -> dict[torch.Tensor, dict[str, Any]]:
    """The inner optimizer's state: flat master -> exp_avg, exp_avg_sq, step."""
    return engine.optimizer.optimizer.state  # type: ignore[no-any-return]
