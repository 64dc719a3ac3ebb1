"""A model that is not a ViT and has buffers."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """A residual MLP block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Mlp(nn.Module):
    """Images [B, 3, 8, 8] -> logits [B, num_labels].

    The input is scaled by a persistent buffer and shifted by one that is not persistent.
    """

    def __init__(self, num_labels: int, width: int, depth: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((1,), 0.5))
        self.register_buffer("shift", torch.full((1,), 0.25), persistent=False)
        self.embed = nn.Linear(3 * 64, width)
        self.head = nn.Linear(width, num_labels)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(
            images.flatten(1) * self.scale.to(images.dtype) + self.shift.to(images.dtype)
        )
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mlp(num_labels: int, width: int = 32, depth: int = 2) -> nn.Module:
    """Build an `Mlp`; a factory for `model.factory`."""
    return Mlp(num_labels, width, depth)
