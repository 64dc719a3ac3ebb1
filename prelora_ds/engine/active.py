"""Change which of a plan's parameters train now, on the live engine.

DynaLoRA chooses other adapters every few dozen steps; a transition for each choice would take
longer than the steps between them.
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
    """Check that ``names`` can be the active parameters of ``plan``. Collective.

    Raises the same ValueError on every rank for a name that does not train under ``plan``, for an
    empty set, and for sets that differ between ranks.
    """
    unknown = sorted(names - plan.trainable)
    digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
    ranks: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(ranks, (digest, unknown[:1], len(names)))

    for rank, (_, unknown_there, count) in enumerate(ranks):
        if unknown_there:
            raise ValueError(
                f"rank {rank} activates {unknown_there[0]!r}, which is not a parameter that trains "
                f"in phase {plan.phase}"
            )
        if not count:
            raise ValueError(f"rank {rank} activates no parameter: nothing would train")

    mismatched = [rank for rank, (other, *_) in enumerate(ranks) if other != ranks[0][0]]
    if mismatched:
        raise ValueError(f"ranks {mismatched} activate other parameters than rank 0")


def apply_active(engine: DeepSpeedEngine, plan: Plan, layout: Layout) -> None:
    """Train only `Plan.training` from the next forward pass on; the same set on all ranks.

    The other parameters that ``plan`` trains require no gradient until the next call, which keeps
    them out of the backward pass. DeepSpeed 0.19 allows this: it counts the gradient hooks to wait
    for in each backward pass, and stage 3 uses zeros where a gradient is not required.

    It would not be enough to skip an adapter in its linear only: stage 3 would keep the last
    gradient of that adapter, which would enter the norm of every later step, and if it were not
    finite, every later step would be skipped. The linear is informed in addition, because it need
    not merge an adapter that does not change.
    """
    names = plan.training()
    activate(engine.module, plan, layout)
    for name, p in named_parameters(engine.module).items():
        if name in plan.trainable:
            p.requires_grad_(name in names)
    inner_optimizer(engine).active = None if names == plan.trainable else names
