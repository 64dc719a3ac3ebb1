"""What a fork, a new run from the checkpoint of another, has in common with its source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prelora_ds.config.changes import what_binds
from prelora_ds.config.tree import Config
from prelora_ds.core.controller import index_of
from prelora_ds.core.phases import switch_tests, windowing_of
from prelora_ds.errors import ConfigError
from prelora_ds.run.stored import read_stored


def check_fork(state: Mapping[str, Any], config: Config, checkpoint: Path) -> None:
    """Compare the phases that have begun at a checkpoint with those of a fork.

    state: the state of the checkpoint, as JSON.

    Past phases must be the same. Of the phase that has begun, the end (``until``) may differ.
    Raises ConfigError.
    """
    source = _config_of(state["config"], config, checkpoint)
    names = [phase.name for phase in source.phase_list]
    try:
        index = index_of(state["run"]["phase"])
        current = names[index]
    except (KeyError, TypeError, ValueError, IndexError):
        return  # Reported when the checkpoint is loaded.

    _check_flops(state["run"]["phase"], config, index, checkpoint)
    before = source.trained_phases()
    after = config.trained_phases()
    for i, name in enumerate(names[: index + 1]):
        key: str | None = "name"
        old: Any = name
        new: Any = None
        if i < len(after):
            same = {"until": before[i]["until"]} if i == index else {}
            key, old, new = _first_difference(before[i], {**after[i], **same})
        if key is not None:
            raise ConfigError(
                f"phases.{name}.{key}",
                new,
                f"was {old!r} in the run of {checkpoint}, which is in phase {current}",
                "keep all phases up to the end of that one unchanged, or start from an earlier "
                "checkpoint",
            )


def _check_flops(phase: Mapping[str, Any], config: Config, index: int, checkpoint: Path) -> None:
    """Raise ConfigError if a budget of the fork counts FLOPs that the source did not count.

    phase: the state of the source's phases, as JSON. index: the number of its phase.
    """
    if index == 0 or "flops" in phase:
        return  # in the first phase, the steps so far have all cost the same
    for spec in config.specs()[index:]:
        if any("flops" in test.needs for test in switch_tests([spec])):
            raise ConfigError(f"phases.{spec.name}.until", "budget", f"needs the FLOPs of all steps so far, which the "
                              f"version that wrote {checkpoint} did not count",
                              "end this phase in another way, or start from a checkpoint of the first phase")


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str | None, Any, Any]:
    """The first dotted key at which two values differ, with both values; None if they are equal."""
    if old == new:
        return None, old, new
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        name = next(name for name in old if old[name] != new[name])
        return _first_difference(old[name], new[name], f"{key}.{name}".lstrip("."))
    return key, old, new


def windows_differ(source: Mapping[str, Any], trained_on: Mapping[str, str], config: Config,
                   data: Mapping[str, str], index: int, checkpoint: Path) -> str | None:
    """The first setting because of which a fork cannot compare its windows with the source's.

    source: the stored config of the source.
    trained_on, data: the fingerprints of the data sets of the source and of the fork.
    index: the number of the phase that the checkpoint is in.

    Returns None if the windows of both runs are made alike. Raises ConfigError if the stored config
    cannot be read.
    """
    before = _windows_depend_on(_config_of(source, config, checkpoint), index)
    after = _windows_depend_on(config, index)
    shared = ("data.train",) if {"data.train"} <= trained_on.keys() & data.keys() else ()
    before |= {key: trained_on[key] for key in shared}
    after |= {key: data[key] for key in shared}
    return next((key for key in before if before[key] != after[key]), None)


def _windows_depend_on(config: Config, index: int) -> dict[str, Any]:
    """The settings on which the windows of phase ``index`` depend, of those a fork may change."""
    every = config.observe.every
    return {
        "observe.every": (every, config.train.duration if every.unit == "%" else None),
        "observe.spectra": config.observe.spectra,
        "the families whose norms are measured": set(config.families()),
        "the test that makes windows": windowing_of(config.specs(), index),
        "train.label_smoothing": config.train.label_smoothing,
    }


def _config_of(stored: Mapping[str, Any], config: Config, checkpoint: Path) -> Config:
    """The ``stored`` config of a source, with the values of ``config`` for where and how it runs.

    How its phases are run has the defaults, because the settings of the two runs may not fit
    together. Raises ConfigError.
    """
    values = config.model_dump(mode="json")
    where = {key: values[key] for key in values.keys() - {"phases", "deepspeed"}}
    return read_stored(what_binds(stored, where), config, checkpoint)
