"""Data sets that fail in a worker.

The module does not import pytest, because each worker imports it.
"""

from __future__ import annotations

from torch.utils.data import Dataset


class OutOfMemory(Dataset[object]):
    """A data set that fails like numpy when memory runs out."""

    def __getitems__(self, keys: list[object]) -> object:
        raise MemoryError("Unable to allocate 11.9 GiB")


class Says(Dataset[object]):
    """A data set that raises RuntimeError with the key as its message."""

    def __getitems__(self, keys: list[object]) -> object:
        raise RuntimeError(keys[0])
