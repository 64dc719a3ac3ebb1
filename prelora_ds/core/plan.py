"""What an engine is built from: which adapters exist, what trains, and what of it trains now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prelora_ds.core.adapters import AdapterSpec, Lora, Shape, kind_of
from prelora_ds.core.codec import fields_from_json
from prelora_ds.core.layout import Layout

BASE = "base"  # the role of every parameter that is not an adapter's
ADAPTERS = "adapters"  # what a scale for all roles of adapters is called


@dataclass(frozen=True)
class Plan:
    """Everything that fixes the parameters of an engine and how they train.

    Names are those of the model without adapters (``x.weight``), with an adapter's leaves beside it
    (``x.<leaf>``, `prelora_ds.core.adapters`).

    phase: a label for logs and for the settings per phase. Nothing else may read it.
    trainable: the parameters that the optimizer holds.
    adapters: path of a linear -> its adapter.
    lr_scale: role -> factor of the learning rate; ``adapters`` stands for each role of an adapter that has no factor
        of its own, and a role without any factor has 1.
    active: the parameters of ``trainable`` that train now; None means all of them.
    since_step: the optimizer step after which this plan began.
    rewarm: over so many steps from there the learning rate rises to its schedule again.
    cycle: how often the adapters were merged and began anew.
    """

    phase: str
    trainable: frozenset[str]
    adapters: Mapping[str, AdapterSpec] = field(default_factory=dict)
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    active: frozenset[str] | None = None
    since_step: int = 0
    rewarm: int = 0
    cycle: int = 0

    def structure(self) -> tuple[Any, ...]:
        """What an engine must be rebuilt for; plans of equal structure differ in what a live engine can take over."""
        adapters = tuple(sorted((path, spec.kind, spec.rank, spec.scaling, tuple(sorted(spec.options.items())))
                                for path, spec in self.adapters.items()))
        return self.phase, self.trainable, adapters, tuple(sorted(self.lr_scale.items()))

    def training(self) -> frozenset[str]:
        """The parameters that train now."""
        return self.trainable if self.active is None else self.active

    def leaves(self, layout: Layout) -> dict[str, tuple[str, str]]:
        """Name of an adapter's parameter -> (path of its linear, leaf), in the plan's order."""
        return {f"{path}.{leaf}": (path, leaf) for path, spec in self.adapters.items()
                for leaf in kind_of(spec).parameters(layout.parameters[f"{path}.weight"], spec)}

    def parameters(self, layout: Layout) -> dict[str, Shape]:
        """Name -> shape of every parameter that exists under this plan, base first."""
        shapes = dict(layout.parameters)
        for path, spec in self.adapters.items():
            own = kind_of(spec).parameters(layout.parameters[f"{path}.weight"], spec)
            shapes |= {f"{path}.{leaf}": shape for leaf, shape in own.items()}
        return shapes

    def buffers(self, layout: Layout) -> dict[str, Shape]:
        """Name -> shape of every buffer that exists under this plan."""
        return dict(layout.buffers)

    def rate_scales(self, layout: Layout) -> dict[str, float]:
        """Name of every parameter -> the factor of its learning rate."""
        scales = dict.fromkeys(layout.parameters, self.lr_scale.get(BASE, 1.0))
        for name, (path, leaf) in self.leaves(layout).items():
            role = kind_of(self.adapters[path]).role(leaf)
            scales[name] = self.lr_scale.get(role, self.lr_scale.get(ADAPTERS, 1.0))
        return scales

    def frozen_bases(self) -> frozenset[str]:
        """The adapted linears whose own weight does not train."""
        return frozenset(path for path in self.adapters if f"{path}.weight" not in self.trainable)

    def __post_init__(self) -> None:
        for spec in self.adapters.values():
            kind_of(spec)

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Raises CodecError, or KeyError or ValueError, for what is not a plan; reads those of 0.1.0 too."""
        return fields_from_json(cls, _of_0_1_0(data) if "init_seed" in data else data)


def _of_0_1_0(data: Mapping[str, Any]) -> dict[str, Any]:
    """A plan as version 0.1.0 wrote it, in today's form: one kind, one seed, and every adapter active."""
    adapters = {path: {"kind": "lora", "rank": spec["rank"], "scaling": spec["alpha"] / spec["rank"],
                       "seed": data["init_seed"], "options": {}} for path, spec in data["adapters"].items()}
    without_a = adapters and not any(name.endswith(f".{Lora.A}") for name in data["trainable"])
    for spec in adapters.values() if without_a else ():
        spec["options"] = {"train_a": False}
    return {"phase": data["phase"], "trainable": data["trainable"], "adapters": adapters,
            "since_step": data["since_step"]}
