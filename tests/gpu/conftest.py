"""`make test-gpu` runs this folder on GPUs. In `make test` it runs on the CPU, without the tests that need a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from support.pool import RankPool

from prelora_ds.accelerator import driver_version, gpu_count

ON_GPU = os.environ.get("PRELORA_GPU") == "1"


def pytest_sessionstart(session: pytest.Session) -> None:
    import torch

    if ON_GPU and not gpu_count():
        pytest.exit(f"torch {torch.__version__} (CUDA {torch.version.cuda}, ROCm {torch.version.hip}) finds no GPU "
                    f"here; NVIDIA driver: {driver_version() or 'none'}", returncode=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not ON_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: make test-gpu"))


@pytest.fixture
def one(pools: Callable[[int], RankPool]) -> RankPool:
    """One rank; on the CPU the two that other tests use too, because a further pool takes seconds to start."""
    return pools(1 if ON_GPU else 2)


@pytest.fixture
def two(pools: Callable[[int], RankPool]) -> RankPool:
    """Two ranks, with one GPU each."""
    if ON_GPU and gpu_count() < 2:
        pytest.skip("needs two GPUs")
    return pools(2)


@pytest.fixture(params=["one", "two"])
def each(request: pytest.FixtureRequest) -> RankPool:
    """First one rank, then two."""
    pool: RankPool = request.getfixturevalue(request.param)
    return pool
