from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.launches import Zygote, zygote


@pytest.fixture(scope="session")
def forge() -> Iterator[Zygote]:
    """The process that forks the ranks of launches."""
    with zygote() as z:
        yield z
