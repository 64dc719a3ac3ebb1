"""Which settings may differ when a run is resumed: those that affect training at most by rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from prelora_ds.errors import ConfigError

# These set where, how fast and on how many ranks a run executes, and what is watched and kept.
MAY_DIFFER = (
    "run.name", "run.output_dir", "run.deterministic", "run.trackers", "run.project", "data.train", "data.val",
    "data.workers", "data.worker_start", "data.cache_dir", "data.cache_gib", "data.corrupt_budget",
    "train.micro_batch_size", "train.reduce_dtype", "train.log_every", "train.eval_every", "train.divergence",
    "model.activation_checkpointing", "model.compile", "deepspeed", "lora.mode", "phases.*.adapters.mode",
    "phases.*.micro_batch_size", "phases.*.zero_stage",
    "phases.*.deepspeed", "machine", "checkpoint", "guard", "launch")
# These may differ as well in a fork, a new run that begins from the checkpoint of another. Its past phases must be the
# same, which `prelora_ds.core.phases.difference` checks.
MAY_DIFFER_IN_A_NEW_RUN = (
    "optimizer", "train.duration", "train.label_smoothing", "observe", "convergence", "lora", "phases")

# Keys that a later version has renamed: old name -> new name. Stored runs, recipes and overrides of
# older versions are all read by this table.
RENAMED: dict[str, str] = {
    "convergence.every": "observe.every",
    "phases.memory_gib": "machine.memory_gib",
    "phases.calibration": "machine.calibration",
}
_NOTHING = object()


def may_differ(key: str, *, new_run: bool = False) -> bool:
    """Whether ``key`` may have another value in a resumed run, or with ``new_run`` in a fork."""
    free = MAY_DIFFER + (MAY_DIFFER_IN_A_NEW_RUN if new_run else ())
    return any(_is_at_or_below(key.split("."), name.split(".")) for name in free)


def _is_at_or_below(key: list[str], name: list[str]) -> bool:
    return len(key) >= len(name) and all(part in ("*", actual) for part, actual in zip(name, key, strict=False))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *,
                prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old value, new value) wherever two complete configs, as JSON, differ.

    Sections that do not have the same keys (one is null, or its keys are chosen by the user) differ
    as a whole.
    """
    old, new = _by_name(old), _by_name(new)
    for key in sorted(old.keys() | new.keys()):
        name, before, after = prefix + key, old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping) \
                and before.keys() == after.keys():
            yield from differences(before, after, prefix=f"{name}.")
        else:
            yield name, before, after


def binding_differences(old: Mapping[str, Any], new: Mapping[str, Any], *,
                        new_run: bool = False) -> Iterator[tuple[str, Any, Any]]:
    """Yield the `differences` that must not be."""
    return (row for row in differences(old, new) if not may_differ(row[0], new_run=new_run))


def what_binds(stored: Mapping[str, Any], config: Mapping[str, Any], *,
               new_run: bool = False) -> dict[str, Any]:
    """The ``stored`` config of a run, with the values of ``config`` for all keys that may differ.

    So a value that only an older version allowed does not prevent a run that replaces it.
    """
    bound = _by_name(with_new_names(stored))
    current = _by_name(config)
    for pattern in MAY_DIFFER + (MAY_DIFFER_IN_A_NEW_RUN if new_run else ()):
        for name in _matching(pattern, bound):
            _take(bound, name)
            value = _take(deepcopy(current), name)
            if value is not _NOTHING:
                _put(bound, name, value)
    return _as_written(bound)


def _matching(pattern: str, tree: Mapping[str, Any]) -> list[str]:
    """The dotted names that ``pattern`` stands for; ``*`` stands for every phase of ``tree``."""
    if ".*." not in pattern:
        return [pattern]
    section, _, key = pattern.partition(".*.")
    phases = tree.get(section)
    if not isinstance(phases, dict):
        return []
    return [f"{section}.{name}.{key}" for name, phase in phases.items() if isinstance(phase, dict)]


def _by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with the list of phases, if it is one, as a mapping from their names."""
    phases = values.get("phases")
    if not isinstance(phases, list) \
            or not all(isinstance(phase, Mapping) and "name" in phase for phase in phases):
        return dict(values)
    return {**values, "phases": {str(phase["name"]): dict(phase) for phase in phases}}


def _as_written(values: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `_by_name`."""
    phases = values.get("phases")
    if not isinstance(phases, dict) or not phases or not all(
            isinstance(phase, Mapping) and phase.get("name") == name for name, phase in phases.items()):
        return values
    return {**values, "phases": list(phases.values())}


def with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config's ``values``, converted from what an older version wrote.

    Renamed keys get their new names, and ``lora.mode: fa`` becomes ``train_a: false``. Raises
    ConfigError if a key is set under both of its names.
    """
    copied = renamed(values)
    lora = copied.get("lora")
    if isinstance(lora, dict) and lora.get("mode") == "fa":
        copied["lora"] = {**lora, "mode": "branch", "train_a": False}
    return copied


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config's ``values`` with the keys of older versions under their new names.

    Raises ConfigError if a key is set under both of its names.
    """
    copied = deepcopy(dict(values))
    for old, new in RENAMED.items():
        value = _take(copied, old)
        if value is _NOTHING:
            continue
        if _take(deepcopy(copied), new) is not _NOTHING:
            raise ConfigError(old, value, f"is the former name of {new}, which is set as well",
                              f"remove {old}")
        _put(copied, new, value)
    return copied


def new_name(key: str) -> str:
    """The name of a dotted ``key`` in this version."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def _take(tree: Any, name: str) -> Any:
    """Remove the value of a dotted name and return it, or `_NOTHING` if it has none."""
    *sections, key = name.split(".")
    for section in sections:
        tree = tree.get(section) if isinstance(tree, dict) else None
    return tree.pop(key, _NOTHING) if isinstance(tree, dict) else _NOTHING


def _put(tree: Any, name: str, value: Any) -> None:
    """Set a dotted name, unless it has a value already."""
    *sections, key = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            return
    tree.setdefault(key, value)
