"""Data sets that fail in a worker. A worker imports their module, so it is a small one, without pytest."""

from __future__ import annotations

from torch.utils.data import Dataset


class OutOfMemory(Dataset[object]):
    """Fails as numpy does where memory runs out."""

    def __getitems__(self, keys: list[object]) -> object:
        raise MemoryError("Unable to allocate 11.9 GiB")


class Says(Dataset[object]):
    """Raises RuntimeError with the key as its message."""

    def __getitems__(self, keys: list[object]) -> object:
        raise RuntimeError(keys[0])
