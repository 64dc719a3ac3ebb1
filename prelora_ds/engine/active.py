"""Which of the parameters that a plan trains do so now, changed on the live engine.

DynaLoRA chooses its adapters anew every few dozen steps; a transition each time would take longer than the steps.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm

from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.engine.optimizer import inner_optimizer
from prelora_ds.model.adapters import activate
from prelora_ds.model.families import named_parameters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def check_active(plan: Plan, names: frozenset[str]) -> None:
    """Raise the same ValueError on every rank unless ``names`` can be what trains under ``plan``. Collective."""
    unknown = sorted(names - plan.trainable)
    digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
    ranks: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(ranks, (digest, unknown[:1], len(names)))
    for rank, (_, others_unknown, count) in enumerate(ranks):
        if others_unknown:
            raise ValueError(f"{others_unknown[0]!r}, which rank {rank} names as active, is not a parameter that "
                             f"trains in phase {plan.phase}")
        if not count:
            raise ValueError(f"rank {rank} names no parameter as active: nothing would train")
    odd = [rank for rank, (other, *_) in enumerate(ranks) if other != ranks[0][0]]
    if odd:
        raise ValueError(f"ranks {odd} name other parameters as active than rank 0")


def apply_active(engine: DeepSpeedEngine, plan: Plan, layout: Layout) -> None:
    """Train only `Plan.training`, of what ``plan`` trains, from the next forward pass on; the same on all ranks.

    The others require no gradient for the time being, which is what keeps them out of the backward pass: DeepSpeed 0.19
    counts the hooks to wait for in each pass anew, and at stage 3 takes zeros for a gradient that is not required. (An
    adapter that its linear alone left out would keep its last gradient there, in the norm of every later step, and
    where that is not finite, no later step would be taken.) An adapter's linear is told as well, since what it merges
    stands still.
    """
    names = plan.training()
    activate(engine.module, plan, layout)
    for name, p in named_parameters(engine.module).items():
        if name in plan.trainable:
            p.requires_grad_(name in names)
    inner_optimizer(engine).active = None if names == plan.trainable else names
