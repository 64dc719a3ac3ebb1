from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launches import Zygote, zygote

from prelora_ds.data.writer import DIGIT_CLASSES, digits, write_shards


@pytest.fixture(scope="session")
def forge() -> Iterator[Zygote]:
    """Where launches of ranks are forked."""
    with zygote() as z:
        yield z


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, ``train`` and ``val``, for tests that leave them as they are."""
    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "val"):
        write_shards(digits(split), folder / split, samples_per_shard=512, class_names=DIGIT_CLASSES)
    return folder
