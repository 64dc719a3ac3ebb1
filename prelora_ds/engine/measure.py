"""What is measured on an engine's parameters: norms of the effective weights, and whether all ranks hold the same."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch
from deepspeed import comm, zero
from torch import nn

from prelora_ds.engine.build import Engine
from prelora_ds.model.adapters import effective_weight, folded_bases
from prelora_ds.model.families import frobenius, named_parameters


@torch.no_grad()
def weight_norms(engine: Engine) -> dict[str, dict[int, float]]:
    """Family -> layer -> Frobenius norm of W, with its adapter folded in where there is one. Collective at stage 3.

    Measured on the BF16 weights with fp32 sums; every rank computes the same from the same weights.
    """
    parameters, fp32_bases = named_parameters(engine.module), folded_bases(engine.module)
    by_path: dict[str, dict[str, str]] = {}  # path -> name -> leaf
    for name, (path, leaf) in engine.plan.leaves(engine.layout).items():
        by_path.setdefault(path, {})[name] = leaf
    norms: dict[str, dict[int, float]] = {}
    for family, layers in engine.layout.targets.items():
        norms[family] = {}
        for layer, path in layers.items():
            name, leaves = f"{path}.weight", by_path.get(path, {})
            with whole(engine, [parameters[n] for n in (name, *leaves)]) as (weight, *values):
                weight = fp32_bases.get(name, weight)
                held = dict(zip(leaves.values(), values, strict=True))
                effective = effective_weight(weight, held, engine.plan.adapters.get(path))
                norms[family][layer] = frobenius(effective)
    return norms


@contextlib.contextmanager
def whole(engine: Engine, params: Sequence[nn.Parameter]) -> Iterator[Sequence[torch.Tensor]]:
    """The parameters' whole BF16 values, gathered for the time of the context at stage 3. Collective there."""
    if engine.config.zero.stage == 3:
        with zero.GatheredParameters(params):
            yield [p.data for p in params]
    else:
        yield [p.data for p in params]


@torch.no_grad()
def check_ranks_agree(engine: Engine) -> None:
    """Compare a hash of all parameters over ranks; raises RuntimeError on every rank when they differ. Collective.

    At stage 3 the partitions of the ranks make up each parameter, and what is compared is what each rank gathers.
    """
    digest = hashlib.sha256()
    for name, p in named_parameters(engine.module).items():
        digest.update(name.encode())
        with whole(engine, [p]) as (value,):
            digest.update(value.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(engine.ds.device)
    every = [torch.empty_like(mine) for _ in range(comm.get_world_size())]
    comm.all_gather(every, mine)
    odd = [rank for rank, other in enumerate(every) if not torch.equal(other, every[0])]
    if odd:
        raise RuntimeError(f"ranks {odd} hold other parameters than rank 0 in phase {engine.plan.phase}")
