from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import cluster, slurm
from hosts.scenarios import STEPS, Site, local


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[Site]:
    """Three hosts with Slurm. A missing package is a failure in CI, and a reason to skip elsewhere."""
    why = cluster.why_not() or slurm.why_not()
    if why is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no test hosts here: {why}")
    folder = tmp_path_factory.mktemp("cluster")
    with cluster.Cluster(3, folder / "hosts") as hosts:
        yield Site(hosts, shards, slurm.Slurm(hosts).start())


@pytest.fixture(scope="session")
def expected(site: Site) -> list[float]:
    """The losses of two ranks on one host."""
    return local(site, 2, *STEPS)
