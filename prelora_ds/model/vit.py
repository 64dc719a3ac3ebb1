"""Build the model of a run from its config."""

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
    """Build an fp32 module with values drawn from torch's global generator.

    Under ``torch.device("meta")`` it has no values.

    Raises ConfigError if ``model.factory`` cannot be imported, rejects its arguments or does not
    return a module, or if activation checkpointing is requested and the module does not support it.
    """
    if config.factory is not None:
        factory = _load_factory(config.factory)
        try:
            model = factory(num_labels=num_labels, **config.factory_args)
        except TypeError as exc:
            raise ConfigError(
                "model.factory_args",
                config.factory_args,
                f"{config.factory} rejected these arguments: {exc}",
                "pass the factory's arguments; num_labels is added automatically",
            ) from exc
        if not isinstance(model, nn.Module):
            raise ConfigError(
                "model.factory",
                config.factory,
                f"returned a {type(model).__name__}",
                "return a torch.nn.Module",
            )
    else:
        model = ViTForImageClassification(vit_config(config, num_labels))

    if config.activation_checkpointing:
        enable: Callable[[], None] | None = getattr(model, "activation_checkpointing_enable", None)
        if enable is None:
            raise ConfigError(
                "model.activation_checkpointing",
                True,
                f"{type(model).__name__} has no method activation_checkpointing_enable()",
                "add this method, which transformers' models have, or set the key to false",
            )
        enable()
    return model


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile the forward pass of each block at its first call, and discard earlier compiled code.

    Blocks of the same shapes share their code. Blocks are compiled separately because LoRA ranks
    differ between blocks, and because the engine's hooks must stay outside the graph.
    """
    torch._dynamo.reset()
    # Beyond this limit torch would run uncompiled. Each block may compile four times: for training and
    # for evaluation, and with DoRA for each with and without the norms of its weights.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 4 * len(blocks))
    for block in blocks:
        block.forward = torch.compile(block.forward)


def vit_config(config: ModelConfig, num_labels: int) -> ViTConfig:
    """Return the transformers config of a run's ViT."""
    not_of_vit = {"factory", "factory_args", "families", "activation_checkpointing", "compile"}
    sizes = config.model_dump(exclude=not_of_vit)
    sizes["num_labels"] = num_labels  # an argument of the parent class, which mypy does not see
    return ViTConfig(**sizes)


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits [batch, labels] of a module's output, a tensor or a transformers output."""
    return output if isinstance(output, torch.Tensor) else output.logits


def _load_factory(spec: str) -> Callable[..., nn.Module]:
    """Import the function that ``spec`` names. Raises ConfigError."""
    module_name, function = spec.split(":")
    try:
        factory: Callable[..., nn.Module] = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as exc:
        raise ConfigError(
            "model.factory",
            spec,
            f"cannot be imported ({exc})",
            'name an importable "package.module:function"',
        ) from exc
    return factory
