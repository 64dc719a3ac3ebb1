"""Parameter names <-> family (q, k, v, o, fc1, fc2) and layer, and one name for a parameter in every phase."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from prelora_ds.core.layout import Layout
from prelora_ds.errors import ConfigError

# Both naming generations of transformers: before 5, and 5. The paper calls o and fc1 both "dense".
VIT_FAMILIES = {
    "q": r".*\.layers?\.(?P<layer>\d+)\.attention\.(q_proj|attention\.query)",
    "k": r".*\.layers?\.(?P<layer>\d+)\.attention\.(k_proj|attention\.key)",
    "v": r".*\.layers?\.(?P<layer>\d+)\.attention\.(v_proj|attention\.value)",
    "o": r".*\.layers?\.(?P<layer>\d+)\.attention\.(o_proj|output\.dense)",
    "fc1": r".*\.layers?\.(?P<layer>\d+)\.(mlp\.fc1|intermediate\.dense)",
    "fc2": r".*\.layers?\.(?P<layer>\d+)\.(mlp\.fc2|output\.dense)",
}

# What peft calls an adapter of ours; peft's own "default" could be a module of somebody's model.
ADAPTER_NAME = "prelora_adapter"
_WRAPPERS = ("base_layer", ADAPTER_NAME)


def canonical_name(name: str) -> str:
    """The name of a parameter without peft's wrappers: the same before and after an adapter is attached.

    ``x.base_layer.weight`` -> ``x.weight``; ``x.LEAF.prelora_adapter.weight`` -> ``x.LEAF.weight``.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter, in the module's order."""
    return {canonical_name(name): p for name, p in module.named_parameters()}


def find_layout(module: nn.Module, wanted: tuple[str, ...], patterns: Mapping[str, str] | None = None) -> Layout:
    """The layout of ``module`` (without adapters) for the families ``wanted``.

    ``patterns`` maps a family to a regular expression that matches whole module paths and has a group ``layer``;
    by default those of transformers' ViT. Raises ConfigError when a family is unknown, matches nothing, matches
    something that is not a linear, or matches two modules of one layer.
    """
    patterns = VIT_FAMILIES if patterns is None else patterns
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    odd = sorted(names - {name for name, p in module.named_parameters() if p.requires_grad})
    if odd:
        raise ConfigError("model.factory", odd[0], "is tied to another parameter or frozen by the model",
                          "give each parameter once, and let all train: what trains is the plan's to say")
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
    modules = dict(module.named_modules())
    targets: dict[str, dict[int, str]] = {}
    for family in wanted:
        if family not in patterns:
            raise ConfigError("lora.families", family, "is not a family of this model",
                              f"choose among {', '.join(patterns)}, or add it to model.families")
        found: dict[int, str] = {}
        for path in modules:
            match = re.fullmatch(patterns[family], path)
            if match is None:
                continue
            if not (match["layer"] or "").isdecimal():
                raise ConfigError(f"model.families.{family}", patterns[family],
                                  f"finds the layer {match['layer']!r} in {path}", r"let (?P<layer>\d+) match a number")
            layer = int(match["layer"])
            if not isinstance(modules[path], nn.Linear):
                raise ConfigError(f"model.families.{family}", patterns[family],
                                  f"matches {path}, a {type(modules[path]).__name__} and not a torch.nn.Linear",
                                  "narrow the regular expression to the linear modules")
            if layer in found:
                raise ConfigError(f"model.families.{family}", patterns[family],
                                  f"matches both {found[layer]} and {path} for layer {layer}",
                                  "narrow the regular expression to one module a layer")
            found[layer] = path
        if not found:
            raise ConfigError(f"model.families.{family}", patterns[family], "matches no module of this model",
                              f"its linears are, for example: {', '.join(_linears(modules)[:6])}")
        targets[family] = dict(sorted(found.items()))
    return Layout(shapes, targets, {name: tuple(b.shape) for name, b in module.named_buffers()})


def _linears(modules: Mapping[str, nn.Module]) -> list[str]:
    return [path for path, m in modules.items() if isinstance(m, nn.Linear)]


@torch.no_grad()
def frobenius(weight: torch.Tensor) -> float:
    """The Frobenius norm of a matrix, accumulated in fp32."""
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32))
