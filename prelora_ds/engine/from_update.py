"""First values of adapters from the update that the optimizer gives their weights (`init: update`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed import comm

from prelora_ds.core.adapters import Lora, kind_of, rank_of
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.engine.runtime import device
from prelora_ds.engine.state import EngineState, Slice, even_share, gather_full

ROW_NORM = math.sqrt(1 / 3)  # the root mean square of the norm of a row whose elements are uniform up to 1 / sqrt(in)


def start_from_updates(state: EngineState, before: Plan, after: Plan, *, layout: Layout) -> None:
    """Put A of the new adapters that ask for it into an exported state. Collective.

    It is an edit for `transition`. The rows of A are the directions of the inputs in which the last Adam update of the
    weight, exp_avg / sqrt(exp_avg_sq), is largest. An adapter whose weight has no moments gets A from its seed.
    """
    kept = before.adapters.keys() if before.cycle == after.cycle else ()
    new = [path for path, spec in after.adapters.items()
           if path not in kept and kind_of(spec).needs_update(spec) and f"{path}.weight" in state.adam_steps]
    for turn, path in enumerate(new):
        rank, shape = rank_of(after.adapters[path]), layout.parameters[f"{path}.weight"]
        exp_avg, exp_avg_sq = (gather_full(state, f"{path}.weight", key, shape, device())
                               for key in ("exp_avg", "exp_avg_sq"))
        a = torch.empty(rank, shape[1], device=device())
        computed_by = turn % comm.get_world_size()  # one rank, because two machines may round differently
        if comm.get_rank() == computed_by:
            a.copy_(largest_inputs(exp_avg / exp_avg_sq.sqrt().clamp_min(1e-30), rank) * ROW_NORM)
        comm.broadcast(a, src=computed_by)
        start, stop = even_share(a.numel(), comm.get_rank(), comm.get_world_size())
        mine: Any = a.view(-1)[start:stop].to("cpu", copy=True)
        state.slices[f"{path}.{Lora.A}"] = Slice(start, mine)


def largest_inputs(update: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the right singular vectors [rank, in] of ``update`` [out, in] with the largest singular values.

    They are the eigenvectors of the smaller one of the two products of ``update`` with its transpose, in float64. The
    element of each with the largest magnitude is positive.
    """
    exact = update.double()
    outputs, inputs = exact.shape
    if inputs <= outputs:
        vectors = torch.linalg.eigh(exact.t() @ exact).eigenvectors.flip(1)[:, :rank].t()
    else:
        left = torch.linalg.eigh(exact @ exact.t()).eigenvectors.flip(1)[:, :rank]
        vectors = torch.nn.functional.normalize(left.t() @ exact, dim=1)
    signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    signed: torch.Tensor = vectors * signs
    return signed.float()
