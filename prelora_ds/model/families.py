"""Map parameter names to families (q, k, v, o, fc1, fc2) and layers, independently of the phase."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from prelora_ds.core.layout import VIT_FAMILIES, Layout
from prelora_ds.errors import ConfigError

MakeModule = Callable[[], nn.Module]  # returns a new module, with the same names and shapes at each call

# The name of our adapters within peft. Its own "default" could be the name of a module in a model.
ADAPTER_NAME = "prelora_adapter"
_WRAPPERS = ("base_layer", ADAPTER_NAME)


def canonical_name(name: str) -> str:
    """Return a parameter's name without peft's wrappers, the same with and without adapters.

    ``x.base_layer.weight`` -> ``x.weight``; ``x.LEAF.prelora_adapter.weight`` -> ``x.LEAF.weight``.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return canonical name -> parameter, in the module's order."""
    return {canonical_name(name): p for name, p in module.named_parameters()}


def find_layout(
    module: nn.Module,
    wanted: tuple[str, ...],
    patterns: Mapping[str, str] | None = None,
    *,
    factory: str = "model.factory",
) -> Layout:
    """Return the layout of ``module``, which has no adapters, for the families ``wanted``.

    ``patterns`` maps a family to a regular expression that matches full module paths and has a
    group ``layer``; the default are those of transformers' ViT. ``factory`` is the name, in messages, of what
    built the module.

    Raises ConfigError for a tied or frozen parameter, and if a family is unknown, matches nothing,
    matches a module that is not a linear, or matches two modules of one layer.
    """
    patterns = VIT_FAMILIES if patterns is None else patterns
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    untied_and_trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    tied_or_frozen = sorted(names - untied_and_trainable)
    if tied_or_frozen:
        raise ConfigError(
            factory,
            tied_or_frozen[0],
            "is tied to another parameter or frozen by the model",
            "use untied, unfrozen parameters; prelora_ds decides which of them train",
        )

    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
    modules = dict(module.named_modules())
    targets: dict[str, dict[int, str]] = {}
    for family in wanted:
        if family not in patterns:
            raise ConfigError(
                "lora.families",
                family,
                "is not a family of this model",
                f"choose among {', '.join(patterns)}, or add it to model.families",
            )
        targets[family] = _linears_by_layer(modules, family, patterns[family])
    blocks = _blocks(modules, [patterns[family] for family in wanted])
    buffers = {name: tuple(b.shape) for name, b in module.named_buffers()}
    return Layout(shapes, targets, blocks, buffers)


def _blocks(modules: Mapping[str, nn.Module], patterns: Iterable[str]) -> dict[str, int]:
    """Return dotted prefix -> layer of the blocks whose linears ``patterns`` match, and of others.

    The path of a block ends with the component that contains the number of the layer. Modules
    next to it of the same class are blocks too, even if no pattern matches their linears.
    """
    siblings: set[tuple[str, type[nn.Module]]] = set()
    for pattern in patterns:
        for path in modules:
            match = re.fullmatch(pattern, path)
            if match is not None:
                start, end = match.span("layer")
                rest = path[end:].partition(".")[0]
                block = path[:end] + rest
                numbered = rf"{re.escape(path[:start])}(\d+){re.escape(rest)}"
                siblings.add((numbered, type(modules[block])))
    return {
        f"{path}.": int(match[1])
        for path, module in modules.items()
        for numbered, kind in siblings
        if type(module) is kind and (match := re.fullmatch(numbered, path))
    }


def _linears_by_layer(
    modules: Mapping[str, nn.Module], family: str, pattern: str
) -> dict[int, str]:
    """Return layer -> path of the linear that ``pattern`` matches there. Raises ConfigError."""
    key = f"model.families.{family}"
    path_of: dict[int, str] = {}
    for path in modules:
        match = re.fullmatch(pattern, path)
        if match is None:
            continue
        if not (match["layer"] or "").isdecimal():
            raise ConfigError(
                key,
                pattern,
                f"its group layer matches {match['layer']!r} in {path}",
                r"let the group match digits: (?P<layer>\d+)",
            )
        layer = int(match["layer"])
        if not isinstance(modules[path], nn.Linear):
            raise ConfigError(
                key,
                pattern,
                f"matches {path}, which is a {type(modules[path]).__name__}, not a torch.nn.Linear",
                "narrow the regular expression to the linear modules",
            )
        if layer in path_of:
            raise ConfigError(
                key,
                pattern,
                f"matches both {path_of[layer]} and {path} for layer {layer}",
                "narrow the regular expression to one module per layer",
            )
        path_of[layer] = path

    if not path_of:
        linears = [path for path, m in modules.items() if isinstance(m, nn.Linear)]
        raise ConfigError(
            key,
            pattern,
            "matches no module of this model",
            f"the linear modules include: {', '.join(linears[:6])}" if linears
            else "choose a model with torch.nn.Linear modules, because only these can have adapters",
        )
    return dict(sorted(path_of.items()))


@torch.no_grad()
def frobenius(weight: torch.Tensor) -> float:
    """Return the Frobenius norm of a matrix, accumulated in fp32."""
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32))
