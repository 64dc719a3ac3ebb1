"""Check that a model has what the phases of a method name."""

from __future__ import annotations

from dataclasses import replace

import torch

from prelora_ds.config.phases import PhaseConfig, PresetConfig
from prelora_ds.config.rank_rules import UniformRule
from prelora_ds.config.tree import Config
from prelora_ds.core.adapters import kind_of
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import plans_at_rank
from prelora_ds.core.plan import Plan
from prelora_ds.core.selection import candidates
from prelora_ds.errors import ConfigError
from prelora_ds.model.adapters import attach_adapters
from prelora_ds.model.families import MakeModule


def check_method_fits(config: Config, layout: Layout, make_module: MakeModule) -> None:
    """Raise ConfigError if a phase does not fit the model of ``layout``.

    A phase does not fit if a set of parameters matches nothing, if nothing trains, if a rank is
    larger than a linear, if more adapters are to train at a time than there are, if its
    kernel cannot run at its ZeRO stage, if it would quantise or merge into a weight that trains,
    or if an adapter cannot be attached. This check runs
    before training, not days into a run.

    make_module: returns a new module of the model; it is called on the meta device.
    """
    specs = [replace(spec, selection=None) for spec in config.specs()]
    for i, phase in enumerate(config.phase_list):
        try:
            plan = plans_at_rank(specs[: i + 1], layout)[-1]
        except ValueError as exc:
            shown = phase.model_dump(mode="json", exclude_defaults=True)
            raise ConfigError(f"phases.{phase.name}", shown, str(exc),
                              "name parameters and layers of this model") from exc
        _check_ranks(config, phase, plan, layout)
        _check_selection(phase, plan, layout)

        in_phase = config.for_phase(phase.name)
        if phase.zero_stage != "auto" and not in_phase.runs_at(in_phase.zero.stage, plan):
            is_preset = isinstance(config.phases, PresetConfig)
            key = "lora.mode" if is_preset else f"phases.{phase.name}.adapters.mode"
            raise ConfigError(
                key,
                "merged",
                "needs every frozen weight with an adapter complete on every rank, but ZeRO stage 3 "
                "partitions it",
                f"choose branch, or ZeRO stage 0, 1 or 2 for phase {phase.name}",
            )

        trained = sorted(f"{path}.weight" for path in plan.adapters.keys() - plan.frozen_targets())
        if phase.merge is not None and trained:
            raise ConfigError(f"phases.{phase.name}.train", list(phase.trained),
                              f"trains {trained[0]}, so no adapter can be merged into it",
                              "train [adapters, rest], or remove merge")
        if phase.base is not None and trained:
            raise ConfigError(f"phases.{phase.name}.base.dtype", phase.base.dtype,
                              f"quantises the weights below the adapters, but this phase trains {trained[0]}",
                              "train [adapters, rest], or remove base")

        if phase.new_adapters is None:
            continue
        with torch.device("meta"):
            module = make_module()
        try:
            attach_adapters(module, plan, layout, dropout=phase.new_adapters.dropout)
        except (RuntimeError, ValueError) as exc:
            families = list(phase.new_adapters.families or config.families())
            raise ConfigError(config.adapters_key(phase.name, "families"), families,
                              f"adapters cannot be attached in phase {phase.name}: {exc}",
                              "choose other families, or narrow model.families") from exc


def _check_ranks(config: Config, phase: PhaseConfig, plan: Plan, layout: Layout) -> None:
    """Raise ConfigError if new adapters can get a rank that their linear cannot have."""
    if phase.new_adapters is None:
        return
    rule = phase.new_adapters.ranks
    key = "rank" if rule is None else f"ranks.{'rank' if isinstance(rule, UniformRule) else 'r_max'}"
    if isinstance(config.phases, PresetConfig):
        key = "r_max"
    for path, spec in plan.adapters.items():
        shape = layout.parameters[f"{path}.weight"]
        if spec.rank is not None and spec.rank > min(shape):
            raise ConfigError(config.adapters_key(phase.name, key), spec.rank,
                              f"is larger than {path} ({shape[1]} to {shape[0]} features), in phase {phase.name}",
                              f"choose at most {min(shape)}, or other families")
        if spec.rank is not None and kind_of(spec).can.blocks and (spec.rank == 1 or shape[1] % spec.rank):
            sizes = [size for size in range(2, min(shape) + 1) if not shape[1] % size]
            raise ConfigError(config.adapters_key(phase.name, key), spec.rank,
                              f"is the size of blocks in the kind {spec.kind}, and the {shape[1]} inputs of {path} "
                              f"cannot be divided into blocks of this size, in phase {phase.name}",
                              f"choose among {', '.join(map(str, sizes))}, or other families")


def _check_selection(phase: PhaseConfig, plan: Plan, layout: Layout) -> None:
    """Raise ConfigError if the phase cannot choose as many adapters as it is to."""
    if phase.active is None:
        return
    count = len(candidates(plan, layout))
    if not count:
        raise ConfigError(f"phases.{phase.name}.active", phase.active.choose, "selects adapters, but none trains",
                          "let adapters train in this phase, or remove active")
    if phase.active.k is not None and phase.active.k > count:
        raise ConfigError(f"phases.{phase.name}.active.k", phase.active.k,
                          f"is more than the {count} adapters that train in this phase",
                          f"choose at most {count}, or share")
