"""Write a model in the form that timm reads from a local folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from prelora_ds.config.tree import Config
from prelora_ds.data.transforms import eval_short_side
from prelora_ds.errors import ConfigError

# timm's entry point, whose sizes are all overridden by the `model_args` of config.json.
_ARCHITECTURE = "vit_base_patch16_224"
# Path in transformers' ViT -> path in timm's ViT, where q, k and v are one linear.
_TIMM = {"vit.embeddings.cls_token": "cls_token", "vit.embeddings.position_embeddings": "pos_embed",
         "vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "vit.layernorm": "norm",
         "classifier": "head", "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "attn.proj",
         "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def write_timm(
    weights: Mapping[str, torch.Tensor], config: Config, classes: Sequence[str], folder: Path
) -> None:
    """Write the ViT with the fp32 ``weights`` for ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

    Raises ConfigError if timm cannot express its sizes, OSError and SafetensorError.
    """
    description = json.dumps(_description(config, classes), indent=2) + "\n"
    (folder / "config.json").write_text(description, encoding="utf-8")
    save_file(_renamed(weights), folder / "model.safetensors", {"format": "pt"})


def _renamed(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, value in weights.items():
        block = re.fullmatch(r"vit\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if block is None:
            path, dot, leaf = (name, "", "") if name in _TIMM else name.rpartition(".")
            renamed[_TIMM[path] + dot + leaf] = value.contiguous()
        elif block[2] == "attention.q_proj":
            stem = name.replace("q_proj", "{}_proj")
            qkv = torch.cat([weights[stem.format(x)] for x in "qkv"])
            renamed[f"blocks.{block[1]}.attn.qkv.{block[3]}"] = qkv
        elif block[2] not in ("attention.k_proj", "attention.v_proj"):
            renamed[f"blocks.{block[1]}.{_TIMM[block[2]]}.{block[3]}"] = value.contiguous()
    return renamed


def _description(config: Config, classes: Sequence[str]) -> dict[str, Any]:
    """Return the content of config.json, as timm 1.0 reads it."""
    m = config.model
    crops = config.data.crop == "inception"
    return {
        "architecture": _ARCHITECTURE,
        "num_classes": len(classes),
        "num_features": m.hidden_size,
        "global_pool": "token",
        "label_names": list(classes),
        "model_args": {
            "img_size": m.image_size,
            "patch_size": m.patch_size,
            "in_chans": m.num_channels,
            "embed_dim": m.hidden_size,
            "depth": m.num_hidden_layers,
            "num_heads": m.num_attention_heads,
            "mlp_ratio": mlp_ratio(m.hidden_size, m.intermediate_size),
        },
        "pretrained_cfg": {
            "input_size": [m.num_channels, m.image_size, m.image_size],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": crop_pct(m.image_size) if crops else 1.0,
            "crop_mode": "center" if crops else "squash",
            "mean": [0.5] * m.num_channels,
            "std": [0.5] * m.num_channels,
            "num_classes": len(classes),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def crop_pct(image_size: int) -> float:
    """Return the share from which timm computes the short side again: timm truncates ``image_size / share``."""
    short = eval_short_side(image_size)
    share = image_size / short
    return share if math.floor(image_size / share) == short else math.nextafter(share, 0)


def mlp_ratio(width: int, hidden: int) -> float:
    """Return the ratio from which timm computes ``hidden`` again: timm truncates ``width * ratio``.

    Raises ConfigError if the sizes are too large for the precision of a float.
    """
    ratio = hidden / width
    if int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    if int(width * ratio) != hidden:
        raise ConfigError(
            "model.intermediate_size",
            hidden,
            f"cannot be expressed as a ratio of hidden_size {width}, as timm requires",
            "choose another --format",
        )
    return ratio
