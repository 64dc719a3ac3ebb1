"""What a phase is: which adapters exist, their ranks, and what trains. Everything is data and round-trips JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import takewhile
from typing import Any


class Phase(StrEnum):
    """The three phases of PreLoRA, in their order."""

    FULL = "full"
    WARMUP = "warmup"
    LORA = "lora"


@dataclass(frozen=True)
class AdapterSpec:
    """LoRA of rank ``rank``, scaled by ``alpha / rank``."""

    rank: int
    alpha: float

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Layout:
    """What the algorithms need to know of a model; made by `prelora_ds.model.families`.

    parameters: parameter name -> shape, in the module's order, without adapters.
    targets: family -> layer -> path of the linear module that an adapter wraps.
    """

    parameters: Mapping[str, tuple[int, ...]]
    targets: Mapping[str, Mapping[int, str]]

    def modules(self) -> tuple[str, ...]:
        """Paths of all linears that can carry an adapter."""
        return tuple(path for layers in self.targets.values() for path in layers.values())

    def layers(self) -> tuple[int, ...]:
        """The numbers of all layers."""
        return tuple(sorted({layer for layers in self.targets.values() for layer in layers}))

    def block(self, layer: int) -> str:
        """The dotted prefix of all parameters of a layer, ``vit.layers.3.``: up to where paths of layers differ.

        Raises ValueError when there is no such layer.
        """
        for layers in self.targets.values():
            if layer in layers:
                own = layers[layer].split(".")
                others = [path.split(".") for i, path in layers.items() if i != layer]
                shared = min((sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(own, other, strict=False)))
                              for other in others), default=len(own) - 1)
                return ".".join(own[: shared + 1]) + "."
        raise ValueError(f"no family has a layer {layer}")

    def adapter_shapes(self, module: str, rank: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the LoRA parameters of ``module``: A [rank, in], B [out, rank]."""
        out_features, in_features = self.parameters[f"{module}.weight"]
        return {f"{module}.lora_A.weight": (rank, in_features), f"{module}.lora_B.weight": (out_features, rank)}


@dataclass(frozen=True)
class Plan:
    """Everything that fixes the parameter set; the engine builder reads nothing else of the phase.

    Names are those of the model without adapters (``x.weight``), with ``x.lora_A.weight`` and ``x.lora_B.weight``
    beside it. ``active`` are the adapters that train now (all, until DynaLoRA chooses). ``since_step`` is the optimizer
    step at which this plan began.
    """

    phase: Phase
    trainable: frozenset[str]
    adapter: str | None = None
    adapters: Mapping[str, AdapterSpec] = field(default_factory=dict)
    active: frozenset[str] = frozenset()
    init_seed: int = 0
    cycle: int = 0
    since_step: int = 0

    def parameters(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter that exists under this plan, base first."""
        shapes = dict(layout.parameters)
        for module, spec in self.adapters.items():
            shapes |= layout.adapter_shapes(module, spec.rank)
        return shapes

    def frozen_bases(self) -> frozenset[str]:
        """The adapted linears whose own weight does not train."""
        return frozenset(module for module in self.adapters if f"{module}.weight" not in self.trainable)

    def to_json(self) -> dict[str, Any]:
        return {
            "phase": self.phase.value,
            "adapter": self.adapter,
            "adapters": {module: {"rank": s.rank, "alpha": s.alpha} for module, s in self.adapters.items()},
            "trainable": sorted(self.trainable),
            "active": sorted(self.active),
            "init_seed": self.init_seed,
            "cycle": self.cycle,
            "since_step": self.since_step,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        return cls(
            phase=Phase(data["phase"]),
            adapter=data["adapter"],
            adapters={module: AdapterSpec(**spec) for module, spec in data["adapters"].items()},
            trainable=frozenset(data["trainable"]),
            active=frozenset(data["active"]),
            init_seed=data["init_seed"],
            cycle=data["cycle"],
            since_step=data["since_step"],
        )
