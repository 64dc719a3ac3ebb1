"""Where the metrics of a run go besides its logs: TensorBoard, CSV files, W&B and Comet.

All of them are written by DeepSpeed's own monitors. This module sees to it that they are one run
through all phases and jobs, and that the figures of a step appear once:

- TensorBoard and CSV files are cut back to the checkpoint that a job or a rollback continues from.
- W&B and Comet cannot be cut back, so a step that was handed over is not handed over again. A
  resumed run repeats its steps bitwise, so nothing but times would differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from prelora_ds.engine.trackers.base import Event, Tracker
from prelora_ds.engine.trackers.comet import Comet
from prelora_ds.engine.trackers.files import Csv, TensorBoard
from prelora_ds.engine.trackers.wandb import Wandb

__all__ = ["Event", "Tracker", "make_trackers"]


def make_trackers(
    keys: Sequence[str], tensorboard: Path, folder: Path, name: str, project: str, say: Callable[[str], None]
) -> list[Tracker]:
    """Return the trackers that a recipe names.

    tensorboard: the folder of TensorBoard's events. folder: the folder of all other trackers.
    name, project: of the run, at a service. say: prints a line.
    """
    make: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(tensorboard),
        "csv": lambda: Csv(folder / "csv"),
        "wandb": lambda: Wandb(folder, name, project, say),
        "comet": lambda: Comet(folder, name, project, say),
    }
    return [make[key]() for key in keys]
