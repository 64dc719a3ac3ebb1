"""The random generators of this rank as text, so that dropout goes on where it stopped."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import numpy as np
import torch


def capture_rng() -> str:
    """The states of torch's generators (CPU, and the device's if there is one), Python's and NumPy's, as JSON."""
    numpy_state: Any = np.random.get_state()  # a tuple; NumPy annotates it as the dict of legacy=False
    kind, keys, position, has_gauss, gauss = numpy_state
    version, internal, next_gauss = random.getstate()
    states = {"torch": _text(torch.get_rng_state()), "python": [version, list(internal), next_gauss],
              "numpy": [kind, keys.tolist(), position, has_gauss, gauss]}
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    return json.dumps(states)


def seed_rng(seed: int, rank: int, step: int = 0) -> None:
    """Set torch's generators of one rank anew, by ``run.seed``, rank and the steps done.

    Ranks differ from each other, and a step from the next. Torch takes seeds of 64 bits, so the
    product is taken modulo 2^64; its factor is odd and brings no two of them together.
    """
    own = seed + 1 + rank
    torch.manual_seed((own if step == 0 else own * 1_000_003 + step) % 2**64)


def restore_rng(text: str) -> None:
    """Set the generators as `capture_rng` found them; the device's only where both have one."""
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
