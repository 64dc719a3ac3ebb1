"""Convolutions over patches that do not overlap, as products over patches."""

from __future__ import annotations

import torch
from torch import nn


class PatchProduct(nn.Conv2d):
    """A convolution whose stride is its kernel, as one product of all patches with the weight.

    Parameters and result are those of the convolution, but the gradient of the weight may round otherwise. A GPU has
    no fast kernel for the gradient of such a convolution in BF16, and changes the layout of the images before it.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return [B, D, H // P, W // Q] from images [B, C, H, W] and patches of P x Q."""
        batch, channels, height, width = images.shape
        p, q = self.kernel_size
        rows, columns = height // p, width // q
        whole = images[:, :, : rows * p, : columns * q].reshape(batch, channels, rows, p, columns, q)
        patches = whole.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * p * q)
        result: torch.Tensor = nn.functional.linear(patches, self.weight.flatten(1), self.bias).transpose(1, 2)
        return result.reshape(batch, self.out_channels, rows, columns)


def patches_as_products(module: nn.Module) -> nn.Module:
    """Make each convolution over patches in ``module`` a `PatchProduct`, and return ``module``."""
    for conv in module.modules():
        if type(conv) is nn.Conv2d and _is_over_patches(conv):
            conv.__class__ = PatchProduct  # parameters, hooks and names stay as they are
    return module


def _is_over_patches(conv: nn.Conv2d) -> bool:
    return (
        conv.stride == conv.kernel_size != (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )
