"""The model of a run, built from config."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from prelora_ds.config.model import ModelConfig
from prelora_ds.errors import ConfigError


def build_model(config: ModelConfig, num_labels: int) -> nn.Module:
    """An fp32 module with values drawn from torch's global generator (or none, under ``torch.device("meta")``).

    Raises ConfigError when ``model.factory`` cannot be imported or returns no module, or one that cannot checkpoint
    its activations and should.
    """
    if config.factory is not None:
        factory = _load_factory(config.factory)
        try:
            model = factory(num_labels=num_labels, **config.factory_args)
        except TypeError as exc:
            raise ConfigError("model.factory_args", config.factory_args, f"{config.factory} refuses them: {exc}",
                              "pass what the factory takes; num_labels comes by itself") from exc
        if not isinstance(model, nn.Module):
            raise ConfigError("model.factory", config.factory, f"returned a {type(model).__name__}",
                              "return a torch.nn.Module")
    else:
        model = ViTForImageClassification(vit_config(config, num_labels))
    if config.activation_checkpointing:
        enable: Callable[[], None] | None = getattr(model, "activation_checkpointing_enable", None)
        if enable is None:
            raise ConfigError("model.activation_checkpointing", True, f"a {type(model).__name__} has no method "
                              "activation_checkpointing_enable()",
                              "add one, as transformers' models have it, or set it to false")
        enable()
    return model


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile the forward pass of each block, at its first call; what was compiled before is forgotten.

    Blocks of the same shapes share their code. A block, and not the model: ranks differ from block to block, and
    whatever the engine hooks onto a block stays outside.
    """
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit  # beyond it torch goes on uncompiled
    torch._dynamo.config.recompile_limit = max(limit, 2 * len(blocks))  # training and evaluation
    for block in blocks:
        block.forward = torch.compile(block.forward)


def vit_config(config: ModelConfig, num_labels: int) -> ViTConfig:
    """The transformers config of a run's ViT."""
    sizes = config.model_dump(exclude={"factory", "factory_args", "families", "activation_checkpointing", "compile"})
    sizes["num_labels"] = num_labels  # one of its parent's, which mypy does not see among its arguments
    return ViTConfig(**sizes)


def logits_of(output: Any) -> torch.Tensor:
    """Logits [batch, labels] of a module's output, be it a tensor or a transformers output."""
    return output if isinstance(output, torch.Tensor) else output.logits


def _load_factory(spec: str) -> Callable[..., nn.Module]:
    module_name, function = spec.split(":")
    try:
        factory: Callable[..., nn.Module] = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as exc:
        raise ConfigError("model.factory", spec, f"cannot be imported ({exc})",
                          'name an importable "package.module:function"') from exc
    return factory
