"""Frozen weights in few bits: int8 with a scale per row, and the NF4 of QLoRA (Dettmers et al. 2023).

A quantised weight is made from the fp32 value once. The same value gives the same bits on every rank and at every world
size. Products use `dense`, the BF16 value that the codes stand for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from prelora_ds.core.quantised import BLOCK, GROUP

# The levels of NF4: the quantiles of a normal distribution that QLoRA's code has, which include 0 and both ends.
LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
          -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
          0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


class Quantised(Protocol):
    """A weight [out, in] in few bits."""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight in ``dtype``; other types than BF16 hold the BF16 value."""
        ...

    def parts(self) -> list[torch.Tensor]:
        """Return the tensors that the weight consists of."""
        ...


@dataclass(frozen=True)
class Int8:
    """codes [out, in] times scales [out, 1], with codes in int8 and scales in fp32."""

    codes: torch.Tensor
    scales: torch.Tensor

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.codes * self.scales).bfloat16().to(dtype)

    def parts(self) -> list[torch.Tensor]:
        return [self.codes, self.scales]


@dataclass(frozen=True)
class Nf4:
    """Levels times the largest magnitude of each block of 64 elements; the last block is padded with zeros.

    codes: uint8 [blocks * 32], the numbers of the levels of two elements each.
    scales: int8 [blocks]. A block's magnitude is scales * group_scales + offset.
    group_scales: fp32 [groups], one per 256 blocks.
    offset: fp32 scalar.
    pairs: the levels of each byte of codes (`_pairs`), one tensor for all weights.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group_scales: torch.Tensor
    offset: torch.Tensor
    pairs: torch.Tensor
    shape: tuple[int, int]

    def magnitudes(self) -> torch.Tensor:
        """Return the largest magnitude of each block as the second quantisation left it, fp32 [blocks]."""
        scales = self.group_scales.repeat_interleave(GROUP)[: len(self.scales)]
        # A block of small values among large ones could get a negative magnitude, which would change all its signs.
        return (self.scales * scales + self.offset).clamp_min(0)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        levels = self.pairs.index_select(0, self.codes.to(torch.int32)).view(torch.float32).view(-1, BLOCK)
        # Round once: compiled code would leave out a second rounding, and have other bits than an export.
        values = levels.mul_(self.magnitudes()[:, None]).bfloat16()
        outputs, inputs = self.shape
        return values.view(-1)[: outputs * inputs].view(outputs, inputs).to(dtype)

    def parts(self) -> list[torch.Tensor]:
        return [self.codes, self.scales, self.group_scales, self.offset]


@torch.no_grad()
def to_int8(weight: torch.Tensor) -> Int8:
    """Quantise an fp32 weight [out, in]: the largest magnitude of a row becomes the code 127."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales.where(scales > 0, 1)).round().clamp(-127, 127)
    return Int8(codes.to(torch.int8), scales)


@torch.no_grad()
def to_nf4(weight: torch.Tensor) -> Nf4:
    """Quantise an fp32 weight [out, in] to the nearest levels, and the magnitudes of its blocks to int8.

    The paper quantises the magnitudes, after their mean is taken off, to a float of 8 bits.
    """
    outputs, inputs = weight.shape
    blocks = _padded(weight.reshape(-1), BLOCK)
    magnitudes = blocks.abs().amax(1)
    levels = torch.tensor(LEVELS, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / magnitudes.where(magnitudes > 0, 1)[:, None], between).to(torch.uint8).view(-1)

    offset = magnitudes.mean(dtype=torch.float64).float()  # in fp64, so that the order of the sum has no effect
    groups = _padded(magnitudes - offset, GROUP)
    group_scales = groups.abs().amax(1) / 127
    scales = (groups / group_scales.where(group_scales > 0, 1)[:, None]).round().clamp(-127, 127).to(torch.int8)
    return Nf4(codes[::2] << 4 | codes[1::2], scales.view(-1)[: len(magnitudes)].clone(), group_scales, offset,
               _pairs(weight.device), (outputs, inputs))


QUANTISERS: Mapping[str, Callable[[torch.Tensor], Quantised]] = {"int8": to_int8, "nf4": to_nf4}


def _padded(flat: torch.Tensor, length: int) -> torch.Tensor:
    """Return ``flat`` in rows of ``length``, the last one padded with zeros."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % length)).view(-1, length)


@functools.cache
def _pairs(device: torch.device) -> torch.Tensor:
    """Return for each byte of codes its two fp32 levels as one int64 [256], so that one look-up yields both."""
    levels = torch.tensor(LEVELS, device=device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1).view(torch.int64).view(-1)
