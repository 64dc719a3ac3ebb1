"""The plans of PreLoRA's three phases. Every plan is made here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from prelora_ds.core.plan import AdapterSpec, Layout, Phase, Plan


def full_plan(layout: Layout, *, init_seed: int) -> Plan:
    """All parameters train, no adapters."""
    return Plan(Phase.FULL, trainable=frozenset(layout.parameters), init_seed=init_seed)


def warmup_plan(layout: Layout, ranks: Mapping[str, Mapping[int, int]], *, alpha_over_r: float, init_seed: int,
                since_step: int, train_a: bool = True) -> Plan:
    """Adapters of Algorithm 2's ranks beside the weights; everything trains (PreLoRA, warm-up).

    Without ``train_a`` the A of each adapter keeps its first value (LoRA-FA).
    """
    adapters = {
        layout.targets[family][layer]: AdapterSpec(rank, rank * alpha_over_r)
        for family, layers in ranks.items() for layer, rank in layers.items()
    }
    names = [name for module, spec in adapters.items() for name in layout.adapter_shapes(module, spec.rank)
             if train_a or ".lora_A." not in name]
    return Plan(Phase.WARMUP, adapter="lora", adapters=adapters, trainable=frozenset(layout.parameters) | set(names),
                active=frozenset(adapters), init_seed=init_seed, since_step=since_step)


def lora_plan(layout: Layout, warmup: Plan, *, train_rest: bool, since_step: int) -> Plan:
    """The adapters alone train, and with ``train_rest`` whatever is no adapted linear (head, norms, embeddings)."""
    adapter_names = warmup.trainable - set(layout.parameters)
    adapted = {f"{module}.{leaf}" for module in warmup.adapters for leaf in ("weight", "bias")}
    rest = set(layout.parameters) - adapted if train_rest else set()
    return Plan(Phase.LORA, adapter=warmup.adapter, adapters=warmup.adapters, trainable=frozenset(adapter_names | rest),
                active=warmup.active, init_seed=warmup.init_seed, cycle=warmup.cycle, since_step=since_step)


def freeze_below(plan: Plan, layout: Layout, layer: int) -> Plan:
    """``plan`` with everything frozen that the module defines before block ``layer``, and its adapters inactive:
    embeddings, and LayerNorms, biases and adapters of the blocks below, so that the backward pass ends there.

    Raises ValueError when the layout has no such layer.
    """
    block = layout.block(layer)
    names = list(layout.parameters)
    below = set(names[: next(i for i, name in enumerate(names) if name.startswith(block))])
    inactive = {module for module in plan.adapters if f"{module}.weight" in below}
    below |= {name for module in inactive for name in layout.adapter_shapes(module, 1)}
    return replace(plan, trainable=plan.trainable - below, active=plan.active - inactive)


def plans_at_rank(layout: Layout, lora_rank: int, *, alpha_over_r: float = 1.0, train_a: bool = True,
                  train_rest: bool = True) -> tuple[Plan, Plan, Plan]:
    """The plans of the full, warm-up and LoRA phases with one rank for all adapters.

    For what is predicted, timed or checked before Algorithm 2 has given each adapter its rank.
    """
    ranks = {family: dict.fromkeys(layers, lora_rank) for family, layers in layout.targets.items()}
    warmup = warmup_plan(layout, ranks, alpha_over_r=alpha_over_r, init_seed=0, since_step=0, train_a=train_a)
    return full_plan(layout, init_seed=0), warmup, lora_plan(layout, warmup, train_rest=train_rest, since_step=0)
