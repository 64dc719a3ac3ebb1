from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.launches import Zygote, zygote


@pytest.fixture(scope="session")
def forge() -> Iterator[Zygote]:
    """Where launches of ranks are forked."""
    with zygote() as z:
        yield z
