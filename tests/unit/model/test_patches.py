from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from prelora_ds.model.patches import PatchProduct, patches_as_products


@pytest.mark.parametrize(("conv", "size"), [
    (nn.Conv2d(3, 8, 4, 4), (12, 8)),
    (nn.Conv2d(3, 8, (2, 4), (2, 4)), (7, 11)),  # the rest of an image that is not a multiple is left out
    (nn.Conv2d(1, 8, 4, 4, bias=False, padding="valid"), (8, 8)),
])
def test_a_product_over_patches_is_the_convolution(conv: nn.Conv2d, size: tuple[int, int]) -> None:
    conv = conv.double()
    product = patches_as_products(copy.deepcopy(conv))
    assert type(product) is PatchProduct
    images = torch.randn(5, conv.in_channels, *size, dtype=torch.float64, requires_grad=True)
    wanted, result = conv(images), product(images)
    assert result.shape == wanted.shape
    torch.testing.assert_close(result, wanted, rtol=0, atol=1e-13)
    direction = torch.randn_like(wanted)
    for ours, torch_s in zip(torch.autograd.grad(result, [images, *product.parameters()], direction),
                             torch.autograd.grad(wanted, [images, *conv.parameters()], direction), strict=True):
        torch.testing.assert_close(ours, torch_s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("conv", [
    nn.Conv2d(4, 8, 4, 2), nn.Conv2d(4, 8, 4, 4, padding=1), nn.Conv2d(4, 8, 4, 4, dilation=2),
    nn.Conv2d(4, 8, 4, 4, groups=2), nn.Conv2d(4, 8, 1), nn.ConvTranspose2d(4, 8, 4, 4),
])
def test_other_convolutions_stay(conv: nn.Module) -> None:
    assert type(patches_as_products(nn.Sequential(conv))[0]) in (nn.Conv2d, nn.ConvTranspose2d)


def test_a_vit_keeps_the_names_and_the_order_of_its_parameters() -> None:
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                       intermediate_size=8)
    vit = ViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 8, 8)
    before, logits = list(vit.named_parameters()), vit(images).logits
    patches_as_products(vit)
    assert type(vit.vit.embeddings.patch_embeddings.projection) is PatchProduct
    assert [(name, id(p)) for name, p in vit.named_parameters()] == [(name, id(p)) for name, p in before]
    torch.testing.assert_close(vit(images).logits, logits, rtol=0, atol=1e-6)
