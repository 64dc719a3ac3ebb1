"""Save and restore this rank's random generators, so that a resumed run draws the same values."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import numpy as np
import torch


def capture_rng() -> str:
    """Return the states of torch's, Python's and NumPy's generators as JSON.

    Torch's are those of the CPU and, if there is one, of the device.
    """
    numpy_state: Any = (
        np.random.get_state()
    )  # a tuple; NumPy annotates it as the dict of legacy=False
    kind, keys, position, has_gauss, gauss = numpy_state
    version, internal, next_gauss = random.getstate()
    states = {
        "torch": _text(torch.get_rng_state()),
        "python": [version, list(internal), next_gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
    }
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    return json.dumps(states)


def seed_rng(seed: int, rank: int, step: int = 0) -> None:
    """Seed torch's generators of this rank from ``run.seed``, the rank and the steps done.

    The seeds of different ranks differ, and so do those of different steps. Torch takes 64-bit
    seeds, so the result is reduced modulo 2^64; its factor is odd, so different ranks keep
    different products.
    """
    rank_seed = seed + 1 + rank
    if step != 0:
        rank_seed = rank_seed * 1_000_003 + step
    torch.manual_seed(rank_seed % 2**64)


def restore_rng(text: str) -> None:
    """Restore the generators from `capture_rng`'s text.

    The device's state is restored only if it was saved and a device is available.
    """
    states = json.loads(text)
    torch.set_rng_state(_tensor(states["torch"]))
    version, internal, next_gauss = states["python"]
    random.setstate((version, tuple(internal), next_gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(states["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
