"""The config of a run that a checkpoint or an output folder stores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prelora_ds.config.changes import what_binds
from prelora_ds.config.load import validate
from prelora_ds.config.tree import Config
from prelora_ds.errors import ConfigError


def read_stored(values: Mapping[str, Any], config: Config, where: Path) -> Config:
    """Validate the stored ``values`` as a config of this version, for the run of ``config``.

    Raises ConfigError about ``run.output_dir`` if this version does not accept them.
    """
    try:
        return validate(values, str(where))
    except ConfigError as exc:
        raise ConfigError(
            "run.output_dir",
            config.run.output_dir,
            f"{where} contains settings that this version of prelora_ds does not accept: "
            f"{exc.key} = {exc.value!r}: {exc.problem}",
            "continue with the version that wrote them, or choose another run.output_dir",
        ) from exc


def settings_of(values: Mapping[str, Any], config: Config, where: Path, *, new_run: bool) -> dict[str, Any]:
    """Return the config of a stored run as JSON in the form of this version, to be compared with ``config``.

    Another version may have written it. Missing keys get their defaults. Raises ConfigError.
    """
    bound = what_binds(values, config.model_dump(mode="json"), new_run=new_run)
    return read_stored(bound, config, where).model_dump(mode="json")
