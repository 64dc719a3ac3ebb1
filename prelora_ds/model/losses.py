"""Softmax and sigmoid cross-entropy, for hard or soft labels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from prelora_ds.errors import ConfigError

SIGMOID_BIAS = -6.9  # as in big_vision: every class starts at a probability of about 1/1000


def classification_loss(
    logits: Tensor, targets: Tensor, *, kind: Literal["softmax", "sigmoid"], label_smoothing: float
) -> Tensor:
    """Return the mean loss over the batch, a scalar.

    logits: fp32 [B, K].
    targets: hard labels, int64 [B], or soft labels, fp32 [B, K].
    kind: ``sigmoid`` sums K binary cross-entropies per sample (Beyer et al. 2020, "Are we done with
        ImageNet?").
    label_smoothing: the share of each target that is spread evenly over the K classes.
    """
    if kind == "softmax":
        return functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if targets.ndim == 1:
        targets = functional.one_hot(targets, logits.shape[1]).float()
    targets = targets * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    return (
        functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
    )


@torch.no_grad()
def count_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many samples have their label as the largest logit, how many among the largest 5, and their number.

    The result is fp32 [3].

    logits: [B, K]. labels: int64 [B]. A sample with a logit that is not finite counts as wrong.
    """
    largest = logits.topk(min(5, logits.shape[1])).indices
    hits = (largest == labels[:, None]) & logits.isfinite().all(1, keepdim=True)
    # The number is filled in on the device: a copy from the host would wait for all work that is queued there.
    return torch.stack([hits[:, 0].sum(), hits.sum(), labels.new_full((), len(labels))]).float()


@torch.no_grad()
def init_sigmoid_head(module: nn.Module, num_labels: int) -> None:
    """Initialize the last linear with ``num_labels`` outputs to weight 0 and bias `SIGMOID_BIAS`.

    The sigmoid loss then starts small. Raises ConfigError if no such linear has a bias.
    """
    heads = [
        m
        for m in module.modules()
        if isinstance(m, nn.Linear) and m.out_features == num_labels and m.bias is not None
    ]
    if not heads:
        raise ConfigError(
            "train.loss",
            "sigmoid",
            f"the model has no linear with {num_labels} outputs and a bias",
            "use softmax",
        )
    heads[-1].weight.zero_()
    heads[-1].bias.fill_(SIGMOID_BIAS)
