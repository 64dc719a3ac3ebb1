"""`model:` of a recipe."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from prelora_ds.config.fields import FieldError, Positive, Share, Strict


class ModelConfig(Strict):
    """Sizes in the names of transformers' ViTConfig; or ``factory`` for any other torch module.

    ``factory`` is ``"package.module:function"``, called with ``factory_args`` and ``num_labels``; it returns a module
    that maps images ``[batch, channels, height, width]`` to logits ``[batch, num_labels]`` (or to an object with
    ``.logits``). ``activation_checkpointing`` keeps only the input of each block for backward and runs its forward pass
    twice. ``compile`` compiles each block by torch.compile, anew in each phase. ``families`` maps a family to a regular
    expression over module paths with a group ``layer``.
    """

    image_size: Positive = 224
    patch_size: Positive = 16
    num_channels: Literal[1, 3] = 3
    hidden_size: Positive = 768
    num_hidden_layers: Positive = 12
    num_attention_heads: Positive = 12
    intermediate_size: Positive = 3072
    hidden_dropout_prob: Share = 0.0
    attention_probs_dropout_prob: Share = 0.0
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    activation_checkpointing: bool = False
    compile: bool = False
    factory: str | None = None
    factory_args: dict[str, Any] = Field(default_factory=dict)
    families: dict[str, str] | None = None

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
            raise FieldError("families", None, "a model.factory needs model.families: family -> regular expression "
                             "over module paths")
        for family, pattern in (self.families or {}).items():
            try:
                groups = re.compile(pattern).groupindex
            except re.error as exc:
                raise FieldError(f"families.{family}", pattern, f"{pattern!r} is not a regular expression: "
                                 f"{exc}") from exc
            if "layer" not in groups:
                raise FieldError(f"families.{family}", pattern, f"{pattern!r} has no group (?P<layer>...)")
        return self
