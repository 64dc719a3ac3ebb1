"""What decides a run besides its config: the model's layout, the samples of an epoch, and the number of ranks.

It is written at the start of each job, so that tools can predict and decide again without torch and without the data.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from prelora_ds.core.codec import from_json, to_json
from prelora_ds.core.layout import Layout
from prelora_ds.errors import ConfigError
from prelora_ds.files import replace_file
from prelora_ds.run.folder import RunFolder

JOB_END = ("PRELORA_JOB_END", "SLURM_JOB_END_TIME")


@dataclass(frozen=True)
class SetupRecord:
    """samples: of one epoch. world_size: the ranks of the last job.

    ends_at: when the batch system ends that job, in seconds since the epoch; None if that is not known.
    """

    layout: Layout
    samples: int
    world_size: int
    ends_at: float | None = None


def job_end(environ: Mapping[str, str] = os.environ) -> float | None:
    """When the batch system ends this job: as the script of `prelora job` says, or Slurm (since 22.05)."""
    for name in JOB_END:
        with contextlib.suppress(KeyError, ValueError):
            return float(environ[name])
    return None


def write_setup(folder: RunFolder, record: SetupRecord) -> str | None:
    """Write the record of the run, in place of that of an earlier job.

    Training does not need it. Returns a warning if it cannot be written, otherwise None.
    """
    try:
        replace_file(folder.setup, json.dumps(to_json(record)))
    except OSError as exc:
        return f"warning: {folder.setup} cannot be written ({exc.strerror}); `prelora replay` needs it"
    return None


def read_setup(folder: RunFolder) -> SetupRecord | None:
    """Return the record, or None if the run was made by a version that did not write one.

    Raises ConfigError for a file that cannot be understood.
    """
    try:
        text = folder.setup.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as exc:
        raise _unreadable(folder, str(exc)) from exc
    try:
        return from_json(SetupRecord, json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise _unreadable(folder, str(exc)) from exc


def _unreadable(folder: RunFolder, why: str) -> ConfigError:
    return ConfigError("RUN", str(folder.setup), f"cannot be understood ({why})",
                       "remove it; the next job of the run writes it again")
