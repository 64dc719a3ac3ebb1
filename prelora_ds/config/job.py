"""How a run is saved and watched: `checkpoint:`, `guard:`, `launch:` and `machine:` of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prelora_ds.config.fields import IntervalOrNull, LocalPlace, Positive, Seconds, Strict
from prelora_ds.core.duration import Duration


class MachineConfig(Strict):
    """What ``auto`` in `phases` knows about the machine."""

    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """
    The memory per rank that `auto` may plan for, in GiB; `null` takes what is free of the rank's GPU
    less 2 GiB for its libraries, or on a CPU the rank's share of the host's memory.
    """

    calibration: LocalPlace | None = None
    """
    The file of measured rates that `prelora calibrate` wrote; `null` takes the data sheet of the
    GPU.
    """


class CheckpointConfig(Strict):
    """Checkpoints in ``run.output_dir/checkpoints`` (docs/checkpoints.md)."""

    every: IntervalOrNull = Duration("1 epoch")
    """
    How often a checkpoint is written, besides at the end; `null` writes one only when the run is
    asked to stop.
    """

    keep_last: Positive = 2
    """How many of the newest checkpoints to keep."""

    keep_best: Annotated[int, Field(ge=0)] = 1
    """
    How many of the checkpoints with the highest validation accuracy to keep. Unless this is 0 or
    `checkpoint.every` is `null`, each evaluation that beats all earlier ones writes a checkpoint.
    """

    keep_every: IntervalOrNull = None
    """An interval at which checkpoints are written and kept permanently; `null` for none."""

    walltime: Seconds | None = None
    """
    The job's time limit, counted from the start of the rank: the run stops with a checkpoint before
    it. `null` for no limit.
    """

    async_: bool = Field(default=True, alias="async")
    """Whether a thread writes checkpoints while training continues."""

    deepspeed_format: bool = False
    """
    Whether each checkpoint also contains a folder in DeepSpeed's own format, which holds pickles
    and is written while training waits.
    """


class GuardConfig(Strict):
    """The watchdog of each rank."""

    hang_limit: Seconds = 1800.0
    """
    The longest time without a step, in seconds: after it a rank prints the stacks of all its
    threads and exits with code 85.
    """


class LaunchConfig(Strict):
    """How the ranks find each other."""

    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,15}$")] | None = None
    """
    The network interface of gloo, NCCL and MPI, for example `eth0`; with `null` gloo uses the
    interface that leads to the master, and the others choose their own.
    """

    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """
    The seconds within which all ranks must check in with rank 0 before the process group is
    created.
    """
