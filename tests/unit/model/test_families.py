from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from prelora_ds.config.adapters import FAMILIES
from prelora_ds.config.model import ModelConfig
from prelora_ds.core.trainable import trainable_names
from prelora_ds.errors import ConfigError
from prelora_ds.model.families import canonical_name, find_layout, frobenius, named_parameters
from prelora_ds.model.vit import build_model

LAYERS = 12
SIZES = ModelConfig(
    image_size=8,
    patch_size=4,
    hidden_size=16,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    intermediate_size=32,
)
OLD_NAMES = {
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "o": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
NEW_NAMES = {
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "o": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def nested(paths: dict[str, nn.Module]) -> nn.Module:
    """A module with a submodule at each dotted path."""
    root = nn.Module()
    for path, leaf in paths.items():
        *parents, name = path.split(".")
        module = root
        for part in parents:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.add_module(name, leaf)
    return root


@pytest.fixture(scope="module")
def old_vit() -> nn.Module:
    """A ViT with the names of transformers before version 5."""
    paths: dict[str, nn.Module] = {"vit.embeddings.patch_embeddings.projection": nn.Conv2d(3, 4, 4)}
    for layer in range(LAYERS):
        paths |= {
            f"vit.encoder.layer.{layer}.{name}": nn.Linear(4, 4) for name in OLD_NAMES.values()
        }
        paths[f"vit.encoder.layer.{layer}.layernorm_before"] = nn.LayerNorm(4)
    return nested(paths | {"vit.pooler.dense": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})


def mistake(
    module: nn.Module, wanted: Sequence[str], patterns: dict[str, str] | None = None
) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        find_layout(module, tuple(wanted), patterns)
    return caught.value


# ---- ViT


def test_six_families_of_the_vit_of_transformers_5_without_weights() -> None:
    with torch.device("meta"):
        module = build_model(SIZES, 10)
    layout = find_layout(module, FAMILIES)
    assert layout.targets == {
        family: {layer: f"vit.layers.{layer}.{name}" for layer in range(LAYERS)}
        for family, name in NEW_NAMES.items()
    }
    assert layout.parameters == {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert list(layout.parameters) == [name for name, _ in module.named_parameters()]
    assert layout.parameters["vit.layers.11.mlp.fc1.weight"] == (32, 16)
    assert all(p.is_meta for p in module.parameters())


def test_six_families_in_the_names_before_transformers_5(old_vit: nn.Module) -> None:
    assert find_layout(old_vit, FAMILIES).targets == {
        family: {layer: f"vit.encoder.layer.{layer}.{name}" for layer in range(LAYERS)}
        for family, name in OLD_NAMES.items()
    }


def test_every_linear_but_head_and_pooler_is_in_one_family(old_vit: nn.Module) -> None:
    modules = find_layout(old_vit, FAMILIES).modules()
    linears = {path for path, m in old_vit.named_modules() if isinstance(m, nn.Linear)}
    assert len(modules) == len(set(modules)) == 6 * LAYERS
    assert linears - set(modules) == {"vit.pooler.dense", "classifier"}


def test_only_the_wanted_families_in_their_order(old_vit: nn.Module) -> None:
    assert list(find_layout(old_vit, ("v", "q")).targets) == ["v", "q"]


def test_layers_are_sorted_as_numbers() -> None:
    order = [10, 2, 0, 11]
    module = nested({f"blocks.{layer}.fc": nn.Linear(2, 2) for layer in order})
    assert list(
        find_layout(module, ("fc",), {"fc": r"blocks\.(?P<layer>\d+)\.fc"}).targets["fc"]
    ) == [0, 2, 10, 11]


# ---- blocks


@pytest.mark.parametrize(
    ("layers", "wanted", "pattern"),
    [
        (1, FAMILIES, None),
        (1, ("q",), None),
        (4, ("v",), r"vit\.layers\.(?P<layer>[12])\.attention\.v_proj"),
        (4, FAMILIES, None),
    ],
)
def test_head_and_embeddings_lie_outside_all_blocks(
    layers: int, wanted: tuple[str, ...], pattern: str | None
) -> None:
    """Also with one layer, and if only the linears of some layers may have adapters."""
    with torch.device("meta"):
        module = build_model(SIZES.model_copy(update={"num_hidden_layers": layers}), 10)
    layout = find_layout(module, wanted, None if pattern is None else {"v": pattern})
    assert layout.blocks == {f"vit.layers.{layer}.": layer for layer in range(layers)}
    assert trainable_names(["head"], layout, {}) == {"classifier.weight", "classifier.bias"}
    assert trainable_names(["embeddings"], layout, {}) == {
        name for name in layout.parameters if name.startswith("vit.embeddings.")
    }
    last = layers - 1
    below = {n for n in layout.parameters if n.startswith(f"vit.layers.{last}.")}
    assert not layout.before(last) & (below | layout.after_blocks())


def test_only_modules_of_the_class_of_a_block_are_blocks() -> None:
    """The first and the last module have a number, too."""
    module = nn.Sequential(nn.Linear(4, 4), *Mixer().blocks, nn.LayerNorm(4), nn.Linear(4, 3))
    layout = find_layout(module, ("up",), {"up": r"(?P<layer>\d+)\.0"})
    assert layout.blocks == {"1.": 1, "2.": 2}
    assert layout.before_blocks() == {"0.weight", "0.bias"}
    assert trainable_names(["head"], layout, {}) == {"4.weight", "4.bias"}


def test_the_number_of_a_layer_may_be_a_part_of_a_name() -> None:
    linears = {f"body.block{i}_a.fc": nn.Linear(2, 2) for i in range(3)}
    module = nested({"stem": nn.Linear(2, 2), **linears, "head": nn.Linear(2, 2)})
    layout = find_layout(module, ("fc",), {"fc": r"body\.block(?P<layer>[02])_a\.fc"})
    assert layout.blocks == {"body.block0_a.": 0, "body.block1_a.": 1, "body.block2_a.": 2}


# ---- any other module


class Mixer(nn.Module):
    """A model with a convolution, two blocks of two linears, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem0 = nn.Conv2d(1, 4, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2)
        )
        self.head = nn.Linear(4, 3)


UP = {"up": r"blocks\.(?P<layer>\d+)\.0"}


def test_patterns_find_the_families_of_another_model() -> None:
    layout = find_layout(Mixer(), ("up", "down"), UP | {"down": r"blocks\.(?P<layer>\d+)\.2"})
    assert layout.targets == {
        "up": {0: "blocks.0.0", 1: "blocks.1.0"},
        "down": {0: "blocks.0.2", 1: "blocks.1.2"},
    }
    assert layout.parameters["stem0.weight"] == (4, 1, 2, 2)


def test_a_pattern_matches_whole_paths_only() -> None:
    module = nested(
        {
            "blocks.0.fc": nn.Linear(2, 2),
            "ema.blocks.0.fc": nn.Linear(2, 2),
            "blocks.0.fc_out": nn.Linear(2, 2),
        }
    )
    assert find_layout(module, ("fc",), {"fc": r"blocks\.(?P<layer>\d+)\.fc"}).targets == {
        "fc": {0: "blocks.0.fc"}
    }


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    error = mistake(Mixer(), ["up", "sideways"], UP)
    assert (error.key, error.value) == ("lora.families", "sideways")
    assert error.remedy == "choose among up, or add it to model.families"
    assert "q, k, v, o, fc1, fc2" in mistake(Mixer(), ["dense"]).remedy


def test_a_family_that_matches_nothing_is_refused_with_existing_linears() -> None:
    error = mistake(Mixer(), ["up"], {"up": r"module\.blocks\.(?P<layer>\d+)\.0"})
    assert error.key == "model.families.up"
    assert error.problem == "matches no module of this model"
    assert "blocks.0.0, blocks.0.2, blocks.1.0, blocks.1.2, head" in error.remedy


def test_a_vit_family_matches_nothing_in_another_model() -> None:
    assert mistake(Mixer(), FAMILIES).key == "model.families.q"


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (r"stem(?P<layer>\d+)", "stem0, which is a Conv2d"),
        (r"blocks\.(?P<layer>\d+)", "blocks.0, which is a Sequential"),
        (r"blocks\.(?P<layer>\d+)\.1", "blocks.0.1, which is a GELU"),
    ],
)
def test_a_family_that_matches_another_module_than_a_linear_is_refused(
    pattern: str, what: str
) -> None:
    error = mistake(Mixer(), ["x"], {"x": pattern})
    assert (error.key, error.value) == ("model.families.x", pattern)
    assert error.problem == f"matches {what}, not a torch.nn.Linear"


def test_two_modules_of_one_layer_are_refused_by_name() -> None:
    error = mistake(Mixer(), ["x"], {"x": r"blocks\.(?P<layer>\d+)\.[02]"})
    assert error.problem == "matches both blocks.0.0 and blocks.0.2 for layer 0"


def test_a_tied_parameter_is_refused_by_name() -> None:
    module = Mixer()
    module.blocks[1][0].weight = module.blocks[0][0].weight
    error = mistake(module, ["up"], UP)
    assert (error.key, error.value) == (
        "model.factory",
        "blocks.1.0.weight",
    ) and "tied" in error.problem


def test_a_parameter_that_the_model_froze_is_refused_by_name() -> None:
    module = Mixer()
    module.head.bias.requires_grad_(False)
    error = mistake(module, ["up"], UP)
    assert (error.key, error.value) == ("model.factory", "head.bias") and "frozen" in error.problem


# ---- names


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("vit.layers.0.mlp.fc1.base_layer.weight", "vit.layers.0.mlp.fc1.weight"),
        ("vit.layers.0.mlp.fc1.base_layer.bias", "vit.layers.0.mlp.fc1.bias"),
        (
            "vit.layers.0.mlp.fc1.lora_A.prelora_adapter.weight",
            "vit.layers.0.mlp.fc1.lora_A.weight",
        ),
        (
            "vit.layers.0.mlp.fc1.lora_B.prelora_adapter.weight",
            "vit.layers.0.mlp.fc1.lora_B.weight",
        ),
        ("vit.layernorm.weight", "vit.layernorm.weight"),
        ("classifier.bias", "classifier.bias"),
        ("default.weight", "default.weight"),
    ],
)
def test_canonical_names_are_without_pefts_wrappers(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical
    assert canonical_name(canonical) == canonical


def test_named_parameters_are_the_modules_own_in_its_order() -> None:
    module = Mixer()
    found = named_parameters(module)
    assert list(found) == [name for name, _ in module.named_parameters()]
    assert all(found[name] is p for name, p in module.named_parameters())


def test_the_frobenius_norm_of_a_bf16_matrix_is_summed_in_fp32() -> None:
    # In bf16, 1 + 1 + ... stops at 256.
    assert frobenius(torch.ones(300, 300, dtype=torch.bfloat16)) == 300.0
    assert frobenius(torch.tensor([[3.0, 0.0], [0.0, 4.0]])) == 5.0
    assert math.isnan(frobenius(torch.tensor([[math.nan]])))
