"""Move values between host and device without waiting for the work that is queued on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Values on their way to the host; `read` waits for what was queued before them, and for nothing else.

    sent: the collective that computes ``values``.
    """

    def __init__(self, values: torch.Tensor, sent: Any) -> None:
        from deepspeed.accelerator import get_accelerator

        self._wait: Callable[[], object] = sent.wait
        if values.device.type != "cpu":
            sent.wait()  # only the stream waits
            values = values.to("cpu", non_blocking=True)  # torch places it in pinned memory
            copied = get_accelerator().Event()
            copied.record()
            self._wait = copied.synchronize
        self._values = values

    def read(self) -> torch.Tensor:
        """Return the values on the host."""
        self._wait()
        return self._values
