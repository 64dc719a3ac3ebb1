"""Every name below ``run.output_dir``, in one place. What lower rooms write there, they get as a path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CHECKPOINTS = "checkpoints"
ASIDE = "aside"  # in checkpoints/, or in another folder of checkpoints
ACCURACY = "accuracy.json"  # in an exported model


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    The names inside a checkpoint are those of `run.checkpoints`, and the names inside the
    supervisor's folder those of `hosts.heartbeat`, because such folders also lie elsewhere.
    """

    path: Path

    @classmethod
    def of_checkpoints(cls, root: Path) -> RunFolder | None:
        """The run whose checkpoints are in ``root``; None for a folder of checkpoints without a run."""
        return cls(root.parent) if root.name == CHECKPOINTS else None

    # ---- what makes it a run's

    @property
    def config(self) -> Path:
        """The resolved config, which a resumed run is held against."""
        return self.path / "config.yaml"

    @property
    def origin(self) -> Path:
        """The ``--resume PATH`` that the run has gone to."""
        return self.path / "origin"

    @property
    def saved(self) -> Path:
        """An empty file that is there once a checkpoint has been written."""
        return self.path / ".saved"

    @property
    def lock(self) -> Path:
        """Names the job that has the folder, under the name that version 0.1.0 looks for."""
        return self.path / ".lease"

    @property
    def supervise(self) -> Path:
        """What `prelora supervise` and its ranks leave, beside the folder."""
        return self.path.with_name(f"{self.path.name}.supervise")

    # ---- logs

    @property
    def metrics(self) -> Path:
        """A row for each logged step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Plans, bytes, resumes, stragglers and the end: a row for each, which names its kind."""
        return self.path / "events.jsonl"

    @property
    def former_events(self) -> Path:
        """Where version 0.1.0 wrote the events. A resumed run renames it."""
        return self.path / "plans.jsonl"

    @property
    def events_to_read(self) -> Path:
        """The events, also those of a run of version 0.1.0 that has not been resumed since."""
        if self.former_events.is_file() and not self.events.exists():
            return self.former_events
        return self.events

    @property
    def windows(self) -> Path:
        """A row for each closed window."""
        return self.path / "windows.jsonl"

    @property
    def observations(self) -> Path:
        """A row for each observation, exactly as the phase controller saw it."""
        return self.path / "observations.jsonl"

    @property
    def logs(self) -> tuple[Path, ...]:
        """All that is written row by row."""
        return self.metrics, self.events, self.windows, self.observations

    @property
    def tensorboard(self) -> Path:
        """A folder of TensorBoard's events."""
        return self.path / "tensorboard"

    # ---- checkpoints

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def latest(self) -> Path:
        """The name of the newest checkpoint."""
        return self.checkpoints / "latest"

    # ---- the result

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.path / "model"

    @property
    def accuracy(self) -> Path:
        """What `prelora evaluate` found for it."""
        return self.model / ACCURACY
