"""The micro-batches of a loader, of which the first of the next step is on the device before the step begins."""

from __future__ import annotations

import time
from typing import Any

import torch

from prelora_ds.data.batch import MicroBatch, cut_again
from prelora_ds.data.loader import Loader
from prelora_ds.engine.transfer import to_device


class DeviceFeed:
    """The micro-batches of ``loader``, step after step, for an engine on ``device``.

    On a GPU `look_ahead` takes those of the next step while the device computes, and copies the first of them on a
    stream of its own. The others follow in the step itself, so that they take no memory before. On a CPU there is
    nothing to overlap with: `look_ahead` does nothing, and `next` is the loader's.

    ahead: whether `look_ahead` does something; None decides by the device.
    waited_s: seconds that this rank waited for the data of the step that `next` returned last.
    """

    def __init__(self, loader: Loader, device: torch.device, *, ahead: bool | None = None) -> None:
        from deepspeed.accelerator import get_accelerator

        self.waited_s = 0.0
        self._loader = loader
        self._device = device
        self._ahead = device.type != "cpu" if ahead is None else ahead
        self._accelerator = get_accelerator()
        self._stream: Any = None if device.type == "cpu" else self._accelerator.Stream()
        self._taken: list[MicroBatch] | Exception | None = None

    def next(self) -> list[MicroBatch]:
        """Return the micro-batches of the step. Raises what `Loader.next` raises."""
        if self._taken is None:
            self._take()
        taken, self._taken = self._taken, None
        if isinstance(taken, Exception):
            raise taken
        assert taken is not None
        self.waited_s = self._loader.waited_s
        self._hand_over(taken[0])
        return taken

    def look_ahead(self) -> float:
        """Take the micro-batches of the next step; returns the seconds that it took.

        What the loader raises is raised by the next call of `next`, when the step is due.
        """
        if not self._ahead:
            return 0.0
        begun = time.perf_counter()
        self._take()
        return time.perf_counter() - begun

    def rebatch(self, micro_batch_size: int) -> None:
        """Cut the rows of the next step, and of all later ones, into micro-batches of another size.

        Raises ValueError as `Loader.rebatch` does.
        """
        self._loader.rebatch(micro_batch_size)
        if isinstance(self._taken, list) and len(self._taken[0].labels) != micro_batch_size:
            self._hand_over(self._taken[0])
            self._taken = cut_again([self._copied(batch) for batch in self._taken], micro_batch_size)

    def close(self) -> None:
        """Close the loader."""
        self._taken = None
        self._loader.close()

    def _take(self) -> None:
        try:
            micro_batches = self._loader.next()
        except Exception as error:
            self._taken = error
            return
        with self._accelerator.stream(self._stream):
            self._taken = [self._copied(micro_batches[0]), *micro_batches[1:]]

    def _copied(self, batch: MicroBatch) -> MicroBatch:
        parts: Any = {key: to_device(part, self._device) for key, part in batch._asdict().items()
                      if isinstance(part, torch.Tensor)}
        return batch._replace(**parts)

    def _hand_over(self, batch: MicroBatch) -> None:
        """Let the current stream wait for the copies of ``batch``, and keep their memory until it has used them."""
        if self._stream is None:
            return
        current = self._accelerator.current_stream()
        current.wait_stream(self._stream)
        for tensor in (batch.images, batch.labels, batch.mix):
            if tensor is not None:
                tensor.record_stream(current)
