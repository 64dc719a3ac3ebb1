"""A GPU's patch embedding, which is a product (`model.patches`), in engines of the CPU."""

from __future__ import annotations

import pytest
from support.runs import Trainer, config

import prelora_ds.engine.build
from prelora_ds.model.patches import PatchProduct, patches_as_products
from prelora_ds.model.vit import build_model


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_products_over_patches_train_as_convolutions(ranks, zero):
    ranks.run(train_both, zero=zero)


def train_both(zero):
    convolution = train(zero)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prelora_ds.engine.build, "build_model", lambda *of: patches_as_products(build_model(*of)))
        product = train(zero, PatchProduct)
    # Rounding depends on the CPU. tests/unit/model/test_patches.py compares in fp64.
    assert product[0] == pytest.approx(convolution[0], abs=1e-3)
    assert product == pytest.approx(convolution, abs=1e-2)


def train(zero, kind=None):
    """Return the losses of three steps of full training and, after a switch, of three with LoRA."""
    t = Trainer(config(zero))
    losses = t.train(3)
    t.switch(t.warmup)
    t.switch(t.lora)
    losses += t.train(3)
    projection = t.engine.module.vit.embeddings.patch_embeddings.projection
    assert (kind is None) == (type(projection) is not PatchProduct)
    t.close()
    return losses
