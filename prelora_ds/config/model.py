"""`model:` of a recipe."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from prelora_ds.config.fields import FieldError, Positive, Share, Strict


class ModelConfig(Strict):
    """The sizes of a Vision Transformer, in the names of transformers' ViTConfig, or a factory of another module."""

    image_size: Positive = 224
    """
    The side of the square input images, in pixels; it must be a multiple of `model.patch_size`.
    """

    patch_size: Positive = 16
    """The side of a square patch, in pixels."""

    num_channels: Literal[1, 3] = 3
    """The channels of an input image: 1 for grey images, 3 for RGB."""

    hidden_size: Positive = 768
    """The width of a token; it must be a multiple of `model.num_attention_heads`."""

    num_hidden_layers: Positive = 12
    """The number of transformer blocks."""

    num_attention_heads: Positive = 12
    """The number of attention heads per block."""

    intermediate_size: Positive = 3072
    """The width of the hidden layer of each MLP."""

    hidden_dropout_prob: Share = 0.0
    """The probability of dropout after the embeddings, after each attention and after each MLP."""

    attention_probs_dropout_prob: Share = 0.0
    """The probability of dropout on the attention weights."""

    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """
    How attention is computed: `sdpa` uses torch's scaled_dot_product_attention, `eager` separate
    matrix products. On a CPU `eager` is faster, because there the backward pass of `sdpa` is slow.
    """

    activation_checkpointing: bool = False
    """
    Whether to keep only the input of each block for the backward pass and to run the block's
    forward pass twice.
    """

    compile: bool = False
    """
    Whether to compile each block with torch.compile (again after each switch). At ZeRO stage 3 a
    block before which nothing trains is not compiled.
    """

    factory: str | None = None
    """
    A function that builds another torch module, written as `package.module:function`. It is called
    with `model.factory_args` and `num_labels`, and returns a module that maps images [batch,
    channels, height, width] to logits [batch, num_labels] or to an object with the attribute
    `logits`. The sizes of this section other than `model.image_size` and `model.num_channels` are
    then unused.
    """

    factory_args: dict[str, Any] = Field(default_factory=dict)
    """The keyword arguments of `model.factory`; `num_labels` is added automatically."""

    families: dict[str, str] | None = None
    """
    The families of linears that can have adapters: each name maps to a regular expression that
    matches whole module paths and has a group `(?P<layer>...)` for the layer's number. It is
    required with `model.factory`; `null` selects the families q, k, v, o, fc1 and fc2 of the ViT.
    """

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.factory is None and self.image_size % self.patch_size:
            raise FieldError("image_size", self.image_size,
                             f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if self.factory is None and self.hidden_size % self.num_attention_heads:
            raise FieldError("hidden_size", self.hidden_size,
                             f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                             f"{self.num_attention_heads}")
        if self.factory is not None and not re.fullmatch(r"[\w.]+:\w+", self.factory):
            raise FieldError("factory", self.factory,
                             f'factory {self.factory!r} is not of the form "package.module:function"')
        if self.factory is not None and self.families is None:
            raise FieldError("families", None, "is required with model.factory: it maps each family to a regular "
                             "expression over module paths")
        for family, pattern in (self.families or {}).items():
            try:
                groups = re.compile(pattern).groupindex
            except re.error as exc:
                raise FieldError(f"families.{family}", pattern, f"{pattern!r} is not a valid regular expression: "
                                 f"{exc}") from exc
            if "layer" not in groups:
                raise FieldError(f"families.{family}", pattern, f"{pattern!r} has no group (?P<layer>...)")
        return self
