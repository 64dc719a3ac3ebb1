"""Move values between host and device without waiting for the work that is queued on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return ``tensor`` on ``device``. The copy is queued behind the work of the current stream.

    From memory that is not pinned, the host would wait for all of that work.
    """
    if device.type != "cpu" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def values_on(device: torch.device, values: Sequence[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return ``values`` as a tensor on ``device``."""
    return to_device(torch.tensor(values, dtype=dtype), device)


class Arriving:
    """Values on their way to the host; `read` waits for what was queued before them, and for nothing else."""

    def __init__(self, values: torch.Tensor) -> None:
        from deepspeed.accelerator import get_accelerator

        self._values = values.to("cpu", non_blocking=True)  # torch places it in pinned memory
        self._copied: Any = None
        if values.device.type != "cpu":
            self._copied = get_accelerator().Event()
            self._copied.record()

    def read(self) -> torch.Tensor:
        """Return the values on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values
