"""The plan from which an engine is built: which adapters exist, what can train, and what trains now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prelora_ds.core.adapters import AdapterSpec, Lora, Shape, kind_of, rank_of
from prelora_ds.core.codec import fields_from_json, fields_to_json
from prelora_ds.core.layout import Layout
from prelora_ds.core.pruning import Pruning
from prelora_ds.core.quantised import BF16, BYTES

BASE = "base"  # the role of every parameter of the model itself
ADAPTERS = "adapters"  # stands for all roles of adapters


@dataclass(frozen=True)
class Plan:
    """Everything that determines the parameters of an engine and how they train.

    Parameters have their names in the model without adapters (``x.weight``); the leaves of an adapter of the linear
    ``x`` are named ``x.<leaf>`` (`prelora_ds.core.adapters`).

    phase: a label for logs and for the settings per phase. Nothing else may depend on it.
    trainable: the parameters that the optimizer holds.
    adapters: path of a linear -> its adapter.
    lr_scale: role -> factor of the learning rate (default: 1). ``adapters`` stands for each role of an adapter that
        is not listed itself.
    active: the parameters of ``trainable`` that train now; None means all of them.
    unadapted: the linears that a rule for ranks has left without an adapter. They are frozen where those with one are.
    base_dtype: the type in which the engine holds the frozen weights that have adapters: ``bf16``, or one of
        `prelora_ds.core.quantised`.
    since_step: the optimizer step after which this plan began.
    cycle: how often the adapters were merged and restarted.
    """

    phase: str
    trainable: frozenset[str]
    adapters: Mapping[str, AdapterSpec] = field(default_factory=dict)
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    active: frozenset[str] | None = None
    since_step: int = 0
    cycle: int = 0
    unadapted: frozenset[str] = frozenset()
    base_dtype: str = BF16

    def structure(self) -> tuple[Any, ...]:
        """The part of the plan that requires a new engine when it changes; a live engine can adopt the rest."""
        adapters = tuple(sorted(
            (path, spec.kind, spec.rank, spec.scaling, tuple(sorted(spec.options.items())))
            for path, spec in self.adapters.items()))
        return self.phase, self.trainable, adapters, tuple(sorted(self.lr_scale.items())), self.base_dtype

    def training(self) -> frozenset[str]:
        """The parameters that train now."""
        return self.trainable if self.active is None else self.active

    def leaves(self, layout: Layout) -> dict[str, tuple[str, str]]:
        """Name of an adapter's parameter -> (path of its linear, leaf), in the plan's order."""
        return {f"{path}.{leaf}": (path, leaf) for path, spec in self.adapters.items()
                for leaf in kind_of(spec).parameters(layout.parameters[f"{path}.weight"], spec)}

    def parameters(self, layout: Layout) -> dict[str, Shape]:
        """Name -> shape of every parameter that exists under this plan; the model's own come first."""
        shapes = dict(layout.parameters)
        for path, spec in self.adapters.items():
            leaves = kind_of(spec).parameters(layout.parameters[f"{path}.weight"], spec)
            shapes |= {f"{path}.{leaf}": shape for leaf, shape in leaves.items()}
        return shapes

    def quantised(self) -> frozenset[str]:
        """The names of the weights that the engine holds in few bits."""
        if self.base_dtype == BF16:
            return frozenset()
        return frozenset(f"{path}.weight" for path in self.frozen_targets())

    def in_module(self, layout: Layout) -> dict[str, Shape]:
        """Name -> shape of every parameter of the module: all but the weights that are quantised."""
        quantised = self.quantised()
        return {name: shape for name, shape in self.parameters(layout).items() if name not in quantised}

    def buffers(self, layout: Layout) -> dict[str, Shape]:
        """Name -> shape of every buffer that exists under this plan."""
        return dict(layout.buffers)

    def rate_scales(self, layout: Layout) -> dict[str, float]:
        """Name -> factor of the learning rate, for every parameter."""
        scales = dict.fromkeys(layout.parameters, self.lr_scale.get(BASE, 1.0))
        for name, (path, leaf) in self.leaves(layout).items():
            role = kind_of(self.adapters[path]).role(leaf)
            scales[name] = self.lr_scale.get(role, _default_scale(self.lr_scale, role))
        return scales

    def frozen_targets(self) -> frozenset[str]:
        """The paths of the linears with an adapter whose own weight does not train."""
        return frozenset(path for path in self.adapters if f"{path}.weight" not in self.trainable)

    def pruning(self) -> Pruning | None:
        """How components of the adapters are pruned; None if they are not."""
        of_kinds = {spec.kind: spec for spec in self.adapters.values()}.values()
        found = (kind_of(spec).pruning(spec.options) for spec in of_kinds)
        return next((pruning for pruning in found if pruning is not None), None)

    def pruned(self) -> dict[str, int]:
        """Path -> number of components, for each adapter whose components are pruned because it trains."""
        pruning = self.pruning()
        if pruning is None:
            return {}
        return {path: rank_of(spec) for path, spec in self.adapters.items()
                if f"{path}.{pruning.gate}" in self.trainable}

    def measured(self, layout: Layout) -> frozenset[str]:
        """The leaves of adapters whose components are pruned, so that the sensitivity of their elements is kept."""
        pruning = self.pruning()
        if pruning is None:
            return frozenset()
        return frozenset(name for name, (_, leaf) in self.leaves(layout).items() if leaf in pruning.axes)

    def __post_init__(self) -> None:
        for spec in self.adapters.values():
            kind_of(spec)
        if self.base_dtype not in (BF16, *BYTES):
            raise ValueError(f"{self.base_dtype!r} is not a type of weights; known are {', '.join((BF16, *BYTES))}")

    def to_json(self) -> dict[str, Any]:
        """The JSON of a plan. It lacks keys that version 0.1.0 does not know where they have their defaults."""
        data = fields_to_json(self)
        if not self.unadapted:
            del data["unadapted"]
        if self.base_dtype == BF16:
            del data["base_dtype"]
        return data

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Read the JSON of a plan, also of version 0.1.0. Raises CodecError, KeyError or ValueError for other data."""
        return fields_from_json(cls, _of_0_1_0(data) if "init_seed" in data else data)


def without_defaults(lr_scale: Mapping[str, float]) -> dict[str, float]:
    """``lr_scale`` without the factors that their roles have anyway."""
    return {
        role: factor
        for role, factor in lr_scale.items()
        if factor != _default_scale(lr_scale, role)
    }


def _default_scale(lr_scale: Mapping[str, float], role: str) -> float:
    """The factor of a ``role`` that ``lr_scale`` does not list."""
    return 1.0 if role in (BASE, ADAPTERS) else lr_scale.get(ADAPTERS, 1.0)


def _of_0_1_0(data: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a plan of version 0.1.0, which has one kind, one seed, and only active adapters."""
    adapters = {
        path: {
            "kind": "lora",
            "rank": spec["rank"],
            "scaling": spec["alpha"] / spec["rank"],
            "seed": data["init_seed"],
            "options": {},
        }
        for path, spec in data["adapters"].items()
    }
    without_a = adapters and not any(name.endswith(f".{Lora.A}") for name in data["trainable"])
    for spec in adapters.values() if without_a else ():
        spec["options"] = {"train_a": False}
    return {"phase": data["phase"], "trainable": data["trainable"], "adapters": adapters,
            "since_step": data["since_step"]}
