"""Predicted bytes, compared with the measurements of benchmarks/zero_stages.py --world (64 and 1,024 ranks)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.plans import full_plan, lora_plan, warmup_plan

from prelora_ds.config.adapters import FAMILIES
from prelora_ds.config.model import ModelConfig
from prelora_ds.config.tree import ZeroSettings
from prelora_ds.core.layout import Layout
from prelora_ds.cost.bytes import predict_bytes, worst_deviation
from prelora_ds.model.families import find_layout
from prelora_ds.model.vit import build_model

ROWS = json.loads((Path(__file__).parents[3] / "benchmarks/results/zero_stages_world.json").read_text())["rows"]
MODELS = {
    "ViT-L/16": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "ViT-g/14": {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 16, "intermediate_size": 6144,
                 "patch_size": 14},
}
RANKS = (8, 16, 32, 64)


def layout_of(title: str) -> Layout:
    with torch.device("meta"):
        return find_layout(build_model(ModelConfig(**MODELS[title]), 1000), FAMILIES)


@pytest.mark.parametrize("title", MODELS)
def test_bytes_of_one_rank_of_many_are_within_2_percent_of_the_prediction(title: str) -> None:
    """The rest is a gradient of one token that holds that of all tokens, at one image per rank."""
    layout = layout_of(title)
    ranks = {family: {layer: RANKS[(i + layer) % 4] for layer in layers}
             for i, (family, layers) in enumerate(layout.targets.items())}
    warmup = warmup_plan(layout, ranks)
    plans = {"full": full_plan(layout), "warmup": warmup,
             "lora": lora_plan(layout, warmup)}
    rows = [row for row in ROWS if row["model"] == title]
    assert {(row["ranks"], row["ZeRO"], row["phase"]) for row in rows} == {
        (world, stage, phase) for world in (64, 1024) for stage in "0123" for phase in plans}
    for row in rows:
        zero = ZeroSettings(int(row["ZeRO"]))
        predicted = predict_bytes(plans[row["phase"]], layout, zero, row["ranks"], after_backward=True,
                                  kernel="branch")
        assert worst_deviation(predicted, row["measured"]) <= 0.02, row
