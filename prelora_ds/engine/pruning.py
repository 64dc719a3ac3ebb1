"""Prune components of adapters in the fp32 masters (AdaLoRA, Zhang et al. 2023).

The optimizer averages the sensitivity of each element and its uncertainty where it has masters and gradients as flat
tensors (`AdamByName`), so that this works at every ZeRO stage. Here the ranks add up the scores of components, decide,
and set the singular values that are pruned to zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from deepspeed import comm
from torch import nn

from prelora_ds.core.pruning import Cut, Pruning, largest
from prelora_ds.engine.fragments import Fragment, adam_state, fragments
from prelora_ds.engine.optimizer import SENSITIVITY, inner_optimizer
from prelora_ds.model.families import named_parameters

if TYPE_CHECKING:
    from prelora_ds.engine.engine import Engine


def prepare(engine: Engine, cut: Cut | None) -> None:
    """Tell the optimizer what its next step measures, and whether pruned components stay at zero."""
    inner = inner_optimizer(engine.ds)
    pruning = None if cut is None else engine.plan.pruning()
    inner.sensitivity_betas = None
    inner.stay_zero = frozenset()
    if cut is None or pruning is None:
        return
    if cut.final:
        inner.stay_zero = frozenset(f"{path}.{pruning.gate}" for path in engine.plan.pruned())
    else:
        inner.sensitivity_betas = (pruning.beta1, pruning.beta2)


@torch.no_grad()
def prune(engine: Engine, keep: int) -> dict[str, int]:
    """Set the singular values of all but the ``keep`` most important components to zero. Collective.

    Returns adapter -> how many of its components remain.

    Adam moments stay, as in the algorithm of the paper: until pruning is over, a singular value may grow again.
    """
    pruning, components = engine.plan.pruning(), engine.plan.pruned()
    assert pruning is not None
    scores = engine.summed(list(_scores(engine, pruning, components).values())).tolist()
    kept = largest(scores, keep)
    flags = torch.tensor([i not in kept for i in range(len(scores))])
    by_path = dict(zip(components, flags.split(list(components.values())), strict=True))
    dropped = {f"{path}.{pruning.gate}": of_path for path, of_path in by_path.items()}

    for fragment in fragments(engine.ds):
        if fragment.name in dropped:
            master = fragment.of(fragment.flat)
            master.masked_fill_(dropped[fragment.name][fragment.start : fragment.stop].to(master.device), 0.0)
    parameters = named_parameters(engine.module)
    for name, of_name in dropped.items():
        _zero_weight(parameters[name], of_name)
    return {path: len(of_path) - int(of_path.sum()) for path, of_path in by_path.items()}


def _scores(engine: Engine, pruning: Pruning, components: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return path -> this rank's part of the importance of each component, fp64 on the engine's device.

    It is the sum over the leaves of the mean of sensitivity times uncertainty (equations 7 and 11).
    """
    device = engine.ds.device
    scores = {path: torch.zeros(count, dtype=torch.float64, device=device) for path, count in components.items()}
    if engine.ds.zero_optimization_stage() == 0 and comm.get_rank() > 0:
        return scores  # every rank holds everything, so that only one of them may count
    leaves, shapes = engine.plan.leaves(engine.layout), engine.plan.parameters(engine.layout)
    state = adam_state(engine.ds)
    for fragment in fragments(engine.ds):
        path, leaf = leaves.get(fragment.name, ("", ""))
        if path not in components or SENSITIVITY[0] not in state.get(fragment.flat, {}):
            continue
        means = _means(fragment, state[fragment.flat], shapes[fragment.name], pruning.axes[leaf])
        scores[path] += means.to(device)
    return scores


def _means(fragment: Fragment, state: Mapping[str, torch.Tensor], shape: tuple[int, ...], axis: int) -> torch.Tensor:
    """Return the mean importance of the elements of each component along ``axis``, with 0 for those of other ranks."""
    sensitivity, uncertainty = (fragment.of(state[key]).double() for key in SENSITIVITY)
    whole = sensitivity.new_zeros(math.prod(shape))
    whole[fragment.start : fragment.stop] = sensitivity.mul_(uncertainty)
    return whole.view(shape).mean(dim=1 - axis)


def _zero_weight(p: nn.Parameter, dropped: torch.Tensor) -> None:
    """Set the elements ``dropped`` of a BF16 parameter to zero, at stage 3 those of this rank's partition."""
    flags = dropped.to(p.device)
    if hasattr(p, "ds_tensor"):
        start = p.ds_tensor.ds_numel * comm.get_rank()
        part = flags[start : start + p.ds_tensor.ds_numel]
        p.ds_tensor.detach()[: len(part)].masked_fill_(part, 0.0)
    if p.data.numel() == len(flags):  # at stage 3 small parameters stay gathered
        p.data.view(-1).masked_fill_(flags, 0.0)
