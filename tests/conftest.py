from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# The tests are those of the CPU also where there is a GPU; `make test-gpu` runs tests/gpu. Torch reads these once.
if os.environ.get("PRELORA_GPU") != "1":
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}

import hypothesis
import pytest
import torch
from support.pool import RankPool

from prelora_ds.data.shards.writer import write_digits

# The tensors of tests are small: threads would wait for each other for longer than they work.
torch.set_num_threads(1)
hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is not a failure
hypothesis.settings.load_profile("no deadline")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(os.getcwd(), ".venv", "torch_extensions"))


class Pools:
    """Rank pools by world size, made when first asked for, remade when a test has broken one."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __call__(self, world_size: int) -> RankPool:
        if world_size not in self._pools or not self._pools[world_size].alive:
            self._pools[world_size] = RankPool(world_size)
        return self._pools[world_size]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, ``train`` and ``val``, for tests that leave them as they are."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture
def ranks(pools: Pools) -> RankPool:
    """Two real ranks."""
    return pools(2)


@pytest.fixture(scope="module")
def own_pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture
def own_ranks(own_pools: Pools) -> RankPool:
    """Two ranks of a module's own, for what the heap that other tests leave would blur."""
    return own_pools(2)
