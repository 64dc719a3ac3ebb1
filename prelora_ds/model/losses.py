"""Softmax or sigmoid cross-entropy, on classes or on shares of classes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from prelora_ds.errors import ConfigError

SIGMOID_BIAS = -6.9  # big_vision's: each of 1,000 classes begins near a probability of 1/1000


def classification_loss(logits: Tensor, targets: Tensor, *, kind: Literal["softmax", "sigmoid"],
                        label_smoothing: float) -> Tensor:
    """Mean over the batch. logits: fp32 [B, K]; targets: int64 [B] classes, or fp32 [B, K] shares.

    ``sigmoid`` sums K binary cross-entropies a sample (Beyer et al. 2020, "Are we done with ImageNet?"). Smoothing
    takes its share from each target and spreads it evenly over the K classes.
    """
    if kind == "softmax":
        return functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if targets.ndim == 1:
        targets = functional.one_hot(targets, logits.shape[1]).float()
    targets = targets * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()


@torch.no_grad()
def init_sigmoid_head(module: nn.Module, num_labels: int) -> None:
    """Kernel 0 and bias `SIGMOID_BIAS` in the last linear of ``num_labels`` outputs: the loss begins small.

    Raises ConfigError when there is none with a bias.
    """
    heads = [m for m in module.modules()
             if isinstance(m, nn.Linear) and m.out_features == num_labels and m.bias is not None]
    if not heads:
        raise ConfigError("train.loss", "sigmoid", f"the model has no linear with {num_labels} outputs and a bias",
                          "use softmax")
    heads[-1].weight.zero_()
    heads[-1].bias.fill_(SIGMOID_BIAS)
