"""A minimal config, changes of it, and errors of a config."""

from __future__ import annotations

from typing import Any

import pytest

from prelora_ds.config.load import load_config
from prelora_ds.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "run": {"name": "t", "output_dir": "o"},
    "data": {"train": "a", "val": "b"},
    "train": {"duration": "10 epochs", "global_batch_size": 24, "micro_batch_size": 4},
}


def merged(changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return MINIMAL with the keys of ``changes`` replaced in each section."""
    return {key: {**MINIMAL.get(key, {}), **changes.get(key, {})} for key in MINIMAL | changes}


def mistake(*args: Any, call: Any = load_config, **kwargs: Any) -> ConfigError:
    """Return the ConfigError that a call raises; it must have a remedy."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert caught.value.remedy
    return caught.value
