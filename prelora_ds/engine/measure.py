"""Measurements on an engine's parameters: weight norms, and agreement between ranks."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from deepspeed import comm, zero
from torch import nn

from prelora_ds.engine.engine import Engine
from prelora_ds.model.adapters import dense_weights, effective_weight, fp32_weights, quantised_linears
from prelora_ds.model.families import frobenius, named_parameters

Norms = dict[str, dict[int, float]]


@dataclass
class WeightNorms:
    """Family -> layer -> Frobenius norm.

    effective: of W with its adapter, if any, folded in.
    base, adapter: of W alone, and of what its adapter adds to it (s B A); only of weights with an adapter.
    """

    effective: Norms = field(default_factory=dict)
    base: Norms = field(default_factory=dict)
    adapter: Norms = field(default_factory=dict)


@torch.no_grad()
def weight_norms(engine: Engine) -> WeightNorms:
    """Return the norms of the weights that may get adapters.

    They are of the weights with which the engine computes, in BF16 or quantised (fp32 where a merged linear keeps
    them), summed in fp32. Every rank computes the same values. Collective at stage 3.
    """
    parameters = named_parameters(engine.module)
    quantised = quantised_linears(engine.module)
    fp32 = fp32_weights(engine.module)
    by_path: dict[str, dict[str, str]] = {}  # path -> name -> leaf
    for name, (path, leaf) in engine.plan.leaves(engine.layout).items():
        by_path.setdefault(path, {})[name] = leaf
    norms = WeightNorms()
    for family, layers in engine.layout.targets.items():
        norms.effective[family] = {}
        for layer, path in layers.items():
            name = f"{path}.weight"
            leaves = by_path.get(path, {})
            in_module = [n for n in (name, *leaves) if n not in quantised]
            with gathered(engine, [parameters[n] for n in in_module]) as found:
                values = dict(zip(in_module, found, strict=True))
                weight = quantised[name].dense_weight() if name in quantised else fp32.get(name, values[name])
                leaf_values = {leaf: values[n] for n, leaf in leaves.items()}
                effective = effective_weight(weight, leaf_values, engine.plan.adapters.get(path))
                norms.effective[family][layer] = frobenius(effective)
                if leaves:
                    norms.base.setdefault(family, {})[layer] = frobenius(weight)
                    norms.adapter.setdefault(family, {})[layer] = frobenius(effective - weight.float())
    return norms


def logits_of(engine: Engine, images: torch.Tensor) -> torch.Tensor:
    """Return the fp32 logits [B, labels] of uint8 ``images`` [B, C, H, W]. Collective at stage 3."""
    with engine.evaluating() as logits:
        return logits(images).clone()


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the root mean square of ``after - before``, relative to that of ``before``."""
    return float((after - before).square().mean().sqrt() / before.square().mean().sqrt())


@contextlib.contextmanager
def gathered(engine: Engine, params: Sequence[nn.Parameter]) -> Iterator[Sequence[torch.Tensor]]:
    """Yield the full BF16 values of ``params``.

    At stage 3 they are gathered for the duration of the context, which is collective there.
    """
    if engine.config.zero.stage == 3:
        with zero.GatheredParameters(params):
            yield [p.data for p in params]
    else:
        yield [p.data for p in params]


@torch.no_grad()
def check_ranks_agree(engine: Engine) -> None:
    """Compare a hash of all parameters and quantised weights between ranks. Collective.

    At stage 3 the gathered parameters are compared. Raises RuntimeError on every rank if they
    differ.
    """
    digest = hashlib.sha256()

    def add(name: str, value: torch.Tensor) -> None:
        digest.update(name.encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)

    for name, p in named_parameters(engine.module).items():
        with gathered(engine, [p]) as (value,):
            add(name, value)
    for name, weight in dense_weights(engine.module):
        add(name, weight)
    mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(engine.ds.device)
    digests = [torch.empty_like(mine) for _ in range(comm.get_world_size())]
    comm.all_gather(digests, mine)
    mismatched = [rank for rank, other in enumerate(digests) if not torch.equal(other, digests[0])]
    if mismatched:
        raise RuntimeError(
            f"parameters of ranks {mismatched} differ from rank 0 in phase {engine.plan.phase}"
        )
