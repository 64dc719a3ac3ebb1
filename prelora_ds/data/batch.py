"""What a loader gives to a step, and how its pairs are mixed on the device.

Rows 2i and 2i+1 of a global batch are a pair, and what becomes of it is drawn from (seed, epoch, pair): neither world
size nor micro-batch enters, so long as no pair is cut.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_MIX_KEY = 3  # apart from the keys of orders, pixels and replacements


class MicroBatch(NamedTuple):
    """images: uint8 [B, C, S, S]. labels: int64 [B]. mix: fp32 [B/2, 6] from `draw_mix`, or None: nothing is mixed.
    faults: a text for each sample that could not be read and has another in its place."""

    images: Tensor
    labels: Tensor
    mix: Tensor | None = None
    faults: tuple[str, ...] = ()


def draw_mix(
    seed: int, epochs: np.ndarray, first: int, *, mixup: float, cutmix: float, size: int
) -> Tensor:
    """fp32 [B/2, 6], a row a pair: (share of the own label, of the own pixels; top, left, bottom, right of a box
    that is all the partner's).

    ``epochs`` [B] has the epoch of each row, ``first`` is the place of the first row in the stream. Mixup (Zhang et
    al. 2018) draws the share from Beta(mixup, mixup), the larger side of it as in big_vision; CutMix (Yun et al. 2019)
    a box of a share of the area from Beta(cutmix, cutmix). Where both are on, each takes every other pair by chance.
    """
    rows = []
    for i in range(0, len(epochs), 2):
        rng = np.random.Generator(
            np.random.PCG64(
                np.random.SeedSequence((seed, int(epochs[i]), (first + i) // 2, _MIX_KEY))
            )
        )
        if cutmix and (not mixup or rng.random() < 0.5):
            side = size * np.sqrt(1 - rng.beta(cutmix, cutmix))
            middle = rng.random(2) * size
            low, high = (np.clip(np.rint(middle + sign * side / 2), 0, size) for sign in (-1, 1))
            rows.append((1 - float(np.prod(high - low)) / size**2, 1.0, *low, *high))
        else:
            share = rng.beta(mixup, mixup)
            rows.append((max(share, 1 - share),) * 2 + (0.0,) * 4)
    return torch.tensor(rows, dtype=torch.float32)


def mix_images(images: Tensor, mix: Tensor) -> Tensor:
    """Float [B, C, S, S] -> the same with the pairs mixed by ``mix`` [B/2, 6]."""
    pairs: Tensor = images.unflatten(0, (-1, 2))
    _, own, top, left, bottom, right = mix.to(images.device)[:, :, None, None].unbind(1)
    place = torch.arange(images.shape[-1], device=images.device, dtype=torch.float32)
    rows, columns = place[:, None], place[None, :]
    partners = (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)
    weight = torch.where(partners, 0.0, own)[:, None, None]  # [B/2, 1, 1, S, S]
    return (weight * pairs + (1 - weight) * pairs.flip(1)).flatten(0, 1)


def mix_labels(labels: Tensor, mix: Tensor, num_labels: int) -> Tensor:
    """int64 [B] -> fp32 [B, num_labels], each row of sum 1."""
    pairs: Tensor = functional.one_hot(labels, num_labels).float().unflatten(0, (-1, 2))
    own = mix.to(labels.device)[:, 0, None, None]
    return (own * pairs + (1 - own) * pairs.flip(1)).flatten(0, 1)
