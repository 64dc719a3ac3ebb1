"""Models built from a config: a ViT of any size, or the model of a user's factory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.plans import warmup_plan

from prelora_ds.config.adapters import FAMILIES
from prelora_ds.config.model import ModelConfig
from prelora_ds.errors import ConfigError
from prelora_ds.model.adapters import attach_adapters
from prelora_ds.model.families import find_layout, named_parameters
from prelora_ds.model.vit import build_model, compile_blocks, logits_of

SIZES: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
FAMILY = {"up": r"blocks\.(?P<layer>\d+)\.up"}


def test_a_vit_has_the_sizes_of_the_config() -> None:
    model = build_model(ModelConfig(**SIZES, num_channels=1), 7)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert logits_of(model(torch.zeros(2, 1, 8, 8))).shape == (2, 7)


def test_a_factory_gets_its_arguments_and_the_number_of_labels() -> None:
    model = build_model(
        ModelConfig(
            factory="support.models:mlp", factory_args={"width": 8, "depth": 1}, families=FAMILY
        ),
        7,
    )
    assert logits_of(model(torch.zeros(2, 3, 8, 8))).shape == (2, 7)
    assert model.get_parameter("embed.weight").shape == (8, 192)


@pytest.mark.parametrize(
    ("factory", "args", "key", "problem"),
    [
        (
            "support.models:mlp",
            {"height": 3},
            "model.factory_args",
            "unexpected keyword argument 'height'",
        ),
        ("support.models:nothing", {}, "model.factory", "no attribute 'nothing'"),
        ("support.nowhere:mlp", {}, "model.factory", "No module named 'support.nowhere'"),
        ("platform:node", {}, "model.factory_args", "unexpected keyword argument 'num_labels'"),
        ("builtins:dict", {}, "model.factory", "returned a dict"),
    ],
)
def test_a_factory_that_returns_no_model_is_named(
    factory: str, args: dict[str, Any], key: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(ModelConfig(factory=factory, factory_args=args, families=FAMILY), 7)
    assert caught.value.key == key and problem in caught.value.problem


def test_activation_checkpointing_changes_no_gradient() -> None:
    images, grads = torch.randn(2, 3, 8, 8), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = build_model(ModelConfig(**SIZES, activation_checkpointing=checkpointed), 7).train()
        logits_of(model(images)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiled_blocks_give_the_same_losses_and_gradients() -> None:
    images, grads = torch.randn(2, 3, 8, 8), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build_model(ModelConfig(**SIZES), 7).train()
        layout = find_layout(model, FAMILIES)
        plan = warmup_plan(layout, {family: {0: 4} for family in FAMILIES})
        attach_adapters(model, plan, layout, dropout=0.0)
        for name, p in named_parameters(model).items():
            torch.nn.init.normal_(p, std=0.1)
            p.requires_grad_(".lora_" in name)  # as in the LoRA phase
        if compiled:
            compile_blocks(list(model.vit.layers))
            torch._dynamo.utils.counters.clear()
        logits_of(model(images)).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_factory_s_model_that_cannot_checkpoint_is_named() -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing_enable"):
        build_model(
            ModelConfig(
                factory="support.models:mlp", families=FAMILY, activation_checkpointing=True
            ),
            7,
        )
