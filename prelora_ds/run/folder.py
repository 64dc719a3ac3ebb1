"""Every name below ``run.output_dir``, in one place.

Lower packages that write there receive a path.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CHECKPOINTS = "checkpoints"
ASIDE = "aside"  # in checkpoints/, or in any other folder of checkpoints
ACCURACY = "accuracy.json"  # in an exported model


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    `run.checkpoints` defines the names inside a checkpoint, and `hosts.heartbeat` those inside the
    supervisor's folder, because such folders also exist elsewhere.
    """

    path: Path

    @classmethod
    def of_checkpoints(cls, root: Path) -> RunFolder | None:
        """Return the run whose checkpoints are in ``root``, or None if there is no run."""
        return cls(root.parent) if root.name == CHECKPOINTS else None

    def has_run(self) -> bool:
        """Return whether there is a run that has begun to log; not if the folder cannot be looked up."""
        return os.path.isfile(self.config) and os.path.isfile(self.metrics)

    # ---- what identifies the run

    @property
    def config(self) -> Path:
        """The resolved config, with which the config of a resumed run is compared."""
        return self.path / "config.yaml"

    @property
    def setup(self) -> Path:
        """What decides the run besides its config (`run.setup_record`)."""
        return self.path / "setup.json"

    @property
    def origin(self) -> Path:
        """The ``--resume PATH`` that the run started from."""
        return self.path / "origin"

    @property
    def saved(self) -> Path:
        """An empty file that exists once a checkpoint has been written."""
        return self.path / ".saved"

    @property
    def lock(self) -> Path:
        """The lock, which names the job that holds the folder; 0.1.0 uses the same name."""
        return self.path / ".lease"

    @property
    def supervise(self) -> Path:
        """The records of `prelora supervise` and its ranks, next to the run's folder."""
        return self.path.with_name(f"{self.path.name}.supervise")

    # ---- logs

    @property
    def metrics(self) -> Path:
        """One row per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """One row per event: a plan, measured bytes, a resume, a straggler or the end."""
        return self.path / "events.jsonl"

    @property
    def former_events(self) -> Path:
        """The file of events of version 0.1.0. A resumed run renames it."""
        return self.path / "plans.jsonl"

    @property
    def events_to_read(self) -> Path:
        """The events: those of version 0.1.0 until this version has resumed the run."""
        if os.path.isfile(self.former_events) and not os.path.exists(self.events):
            return self.former_events
        return self.events

    @property
    def windows(self) -> Path:
        """One row per closed window."""
        return self.path / "windows.jsonl"

    @property
    def observations(self) -> Path:
        """One row per observation, exactly as the phase controller saw it."""
        return self.path / "observations.jsonl"

    @property
    def logs(self) -> tuple[Path, ...]:
        """All files that are written row by row."""
        return self.metrics, self.events, self.windows, self.observations

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's events."""
        return self.path / "tensorboard"

    @property
    def trackers(self) -> Path:
        """The folder of the other trackers, in which `engine.trackers` defines the names."""
        return self.path / "trackers"

    # ---- checkpoints

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def latest(self) -> Path:
        """A file with the name of the newest checkpoint."""
        return self.checkpoints / "latest"

    # ---- the result

    @property
    def model(self) -> Path:
        """The folder of the exported model."""
        return self.path / "model"

    @property
    def accuracy(self) -> Path:
        """The result of `prelora evaluate` for the exported model."""
        return self.model / ACCURACY
