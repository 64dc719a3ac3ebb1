"""The types in which a phase holds frozen weights: their sizes, without torch.

`prelora_ds.model.quantised` has the half that computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from prelora_ds.core.adapters import Shape

BF16 = "bf16"  # the type of a weight that is not quantised
BLOCK = 64  # elements with a scale of their own in NF4
PROBES = 8  # training images on which the change of the outputs is measured
GROUP = 256  # scales of blocks with a scale of their own in NF4


def int8_bytes(shape: Shape) -> int:
    """One byte per element, and an fp32 scale per row."""
    return math.prod(shape) + 4 * shape[0]


def nf4_bytes(shape: Shape) -> int:
    """Half a byte per element, one byte per block, an fp32 scale per group of blocks, and an fp32 offset."""
    blocks = -(-math.prod(shape) // BLOCK)
    return blocks * BLOCK // 2 + blocks + 4 * -(-blocks // GROUP) + 4


# Type -> the bytes of a weight of a shape.
BYTES: Mapping[str, Callable[[Shape], int]] = {"int8": int8_bytes, "nf4": nf4_bytes}
