"""Rank discovery, pure on the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prelora_ds.core.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job."""

    rank: int
    local_rank: int
    world_size: int


def discover_ranks(environ: Mapping[str, str]) -> Ranks:
    """The ranks that the `deepspeed` launcher (or torchrun) put into the environment.

    Raises ConfigError when they are missing or contradict each other.
    """
    keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    missing = [key for key in keys if key not in environ]
    if missing:
        raise ConfigError("environment", ", ".join(missing), "not set: this process was not launched",
                          "start with `deepspeed launch/pretrain.py ...`")
    try:
        ranks = Ranks(*(int(environ[key]) for key in keys))
    except ValueError as exc:
        raise ConfigError("environment", {k: environ[k] for k in keys}, "a rank is no number", "mend the launcher") \
            from exc
    if not 0 <= ranks.local_rank <= ranks.rank < ranks.world_size:
        raise ConfigError("environment", {k: environ[k] for k in keys}, "ranks contradict each other",
                          "each process needs 0 <= LOCAL_RANK <= RANK < WORLD_SIZE of its own")
    return ranks
