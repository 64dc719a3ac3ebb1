"""How a run is kept and watched: `checkpoint:`, `guard:`, `launch:` and `machine:` of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prelora_ds.config.fields import IntervalOrNull, LocalPlace, Positive, Seconds, Strict
from prelora_ds.core.duration import Duration


class MachineConfig(Strict):
    """What ``auto`` in `phases` goes by.

    ``memory_gib`` of a rank (by default its device's, or its share of the host's), and the rates in the file
    ``calibration`` of `prelora calibrate` (by default the GPU's data sheet).
    """

    memory_gib: Annotated[float, Field(gt=0)] | None = None
    calibration: LocalPlace | None = None


class CheckpointConfig(Strict):
    """Checkpoints in ``run.output_dir/checkpoints``, each ``every`` and at the end (null: only when asked to stop).

    keep_last, keep_best: so many of the newest and of the most accurate; keep_every: those that lie on its ticks, too.
    With keep_best, an evaluation that beats all before it makes a checkpoint, whether or not one is due.
    walltime: the job's time limit, counted from the start of the rank; the run stops with a checkpoint before it.
    async: write while training goes on. deepspeed_format: write DeepSpeed's own folder into each checkpoint as well.
    """

    every: IntervalOrNull = Duration("1 epoch")
    keep_last: Positive = 2
    keep_best: Annotated[int, Field(ge=0)] = 1
    keep_every: IntervalOrNull = None
    walltime: Seconds | None = None
    async_: bool = Field(default=True, alias="async")
    deepspeed_format: bool = False


class GuardConfig(Strict):
    """hang_limit: a rank that takes no step for so long ends itself with all stacks and exit code 85."""

    hang_limit: Seconds = 1800.0


class LaunchConfig(Strict):
    """``interface``: the network interface of gloo, NCCL and MPI (null: gloo takes the one towards the master).

    ``timeout_s``: seconds within which all ranks have to come before the process group is made.
    """

    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,15}$")] | None = None
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
