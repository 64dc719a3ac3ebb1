"""Which settings may differ when a run is resumed: those that change nothing of what is trained but its rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Where, how fast and on how many ranks; what is watched and kept.
MAY_DIFFER = (
    "run.name", "run.output_dir", "data.train", "data.val", "data.workers", "data.worker_start", "data.cache_dir",
    "data.cache_gib", "data.corrupt_budget", "train.micro_batch_size", "train.log_every", "train.eval_every",
    "train.divergence", "model.activation_checkpointing", "model.compile", "deepspeed", "phases", "checkpoint", "guard",
    "launch")
# What may differ too when a new run begins from another's checkpoint.
MAY_DIFFER_IN_A_NEW_RUN = ("optimizer", "train.duration", "train.label_smoothing", "convergence", "lora.warmup")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *,
                new_run: bool = False) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) wherever two configs, as JSON, differ in what may not."""
    free = MAY_DIFFER + (MAY_DIFFER_IN_A_NEW_RUN if new_run else ())
    before, after = dict(_leaves(old)), dict(_leaves(new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and not any(key == f or key.startswith(f + ".") for f in free):
            yield key, before.get(key), after.get(key)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
