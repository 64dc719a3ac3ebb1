"""The micro-batches that a loader passes to a step, and the mixing of their pairs on the device.

Rows 2i and 2i+1 of a global batch are a pair. Its mixing is a function of (seed, epoch, pair),
independent of world size and micro-batch as long as no pair is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_MIX_KEY = 3  # distinct from the keys of orders, pixels and replacements


class MicroBatch(NamedTuple):
    """A micro-batch of B rows.

    images: uint8 [B, C, S, S].
    labels: int64 [B].
    mix: fp32 [B/2, 6] from `draw_mix`; None if nothing is mixed.
    faults: a text for each sample that could not be read and was replaced by another.
    """

    images: Tensor
    labels: Tensor
    mix: Tensor | None = None
    faults: tuple[str, ...] = ()


def cut_again(micro_batches: Sequence[MicroBatch], size: int) -> list[MicroBatch]:
    """Return the rows of ``micro_batches`` in micro-batches of ``size`` rows; the first has all faults.

    ``size`` divides the number of rows, and is even if pairs are mixed.
    """
    images, labels = (torch.cat(parts) for parts in zip(*(batch[:2] for batch in micro_batches), strict=True))
    mixes = [batch.mix for batch in micro_batches if batch.mix is not None]
    mix = torch.cat(mixes) if mixes else None
    faults = tuple(fault for batch in micro_batches for fault in batch.faults)
    return [MicroBatch(images[i : i + size], labels[i : i + size],
                       None if mix is None else mix[i // 2 : (i + size) // 2], () if i else faults)
            for i in range(0, len(labels), size)]


def draw_mix(
    seed: int, epochs: np.ndarray, stream_offset: int, *, mixup: float, cutmix: float, size: int
) -> Tensor:
    """Draw how the pairs of B rows are mixed: fp32 [B/2, 6], one row per pair.

    The columns are the weight of the image's own label, the weight of its own pixels, and top,
    left, bottom, right of a box whose pixels all come from the partner.

    epochs: the epoch of each row, [B].
    stream_offset: the index of the first row in the stream.

    Mixup (Zhang et al. 2018) draws the weight w from Beta(mixup, mixup) and uses max(w, 1 - w), as
    big_vision does. CutMix (Yun et al. 2019) draws the share of the area outside the box from
    Beta(cutmix, cutmix). If both are enabled, each pair uses one of them with probability 1/2.
    """
    rows = []
    for i in range(0, len(epochs), 2):
        key = (seed, int(epochs[i]), (stream_offset + i) // 2, _MIX_KEY)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        if cutmix and (not mixup or rng.random() < 0.5):
            side = size * np.sqrt(1 - rng.beta(cutmix, cutmix))
            middle = rng.random(2) * size
            low, high = (np.clip(np.rint(middle + sign * side / 2), 0, size) for sign in (-1, 1))
            rows.append((1 - float(np.prod(high - low)) / size**2, 1.0, *low, *high))
        else:
            weight = rng.beta(mixup, mixup)
            rows.append((max(weight, 1 - weight),) * 2 + (0.0,) * 4)
    return torch.tensor(rows, dtype=torch.float32)


def mix_images(images: Tensor, mix: Tensor) -> Tensor:
    """Mix the pairs of the floating-point ``images`` [B, C, S, S] as described by ``mix`` [B/2, 6]."""
    pairs: Tensor = images.unflatten(0, (-1, 2))
    _, pixel_weight, top, left, bottom, right = mix.to(images.device)[:, :, None, None].unbind(1)
    coordinate = torch.arange(images.shape[-1], device=images.device, dtype=torch.float32)
    rows, columns = coordinate[:, None], coordinate[None, :]
    in_box = (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)
    weight = torch.where(in_box, 0.0, pixel_weight)[:, None, None]  # [B/2, 1, 1, S, S]
    return (weight * pairs + (1 - weight) * pairs.flip(1)).flatten(0, 1)


def mix_labels(labels: Tensor, mix: Tensor, num_labels: int) -> Tensor:
    """Mix int64 ``labels`` [B] to fp32 [B, num_labels]; each row sums to 1."""
    pairs: Tensor = functional.one_hot(labels, num_labels).float().unflatten(0, (-1, 2))
    weight = mix.to(labels.device)[:, 0, None, None]
    return (weight * pairs + (1 - weight) * pairs.flip(1)).flatten(0, 1)
