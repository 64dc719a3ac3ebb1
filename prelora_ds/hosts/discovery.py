"""Rank discovery from environment variables only.

It reads the variables of `deepspeed`, torchrun, srun and mpirun, and checks that they agree, before
anything can hang.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace

from prelora_ds.errors import ConfigError
from prelora_ds.hosts.hostfile import expand_nodelist

DEFAULT_PORT = 29500
# The job id selects the port, so that two jobs on one host use different ones. The range is below
# Linux' ephemeral ports (32768 and up).
JOB_PORTS = range(20000, 32000)
HOW_TO_START = ("start with `deepspeed launch/pretrain.py ...`, torchrun, srun or mpiexec "
                "(docs/hpc.md)")
# Prefixes of other variables that MPI launchers set. mpi4py is asked only if one of them is set:
# its MPI_Init aborts on many login nodes.
MPI_ENV_PREFIXES = ("PMIX_", "PMI_", "PALS_", "MPI_", "MV2_", "MPT_", "I_MPI_", "HYDRA_")
FIELDS = ("rank", "world_size", "local_rank", "local_size")


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job.

    local_size: ranks of this host, if known. master_addr: None if the environment does not provide
    it. source: the launcher whose variables were used.
    """

    rank: int
    local_rank: int
    world_size: int
    local_size: int | None = None
    master_addr: str | None = None
    master_port: int = DEFAULT_PORT
    source: str = "torch"

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Write the variables of torch and DeepSpeed, so that DeepSpeed never asks mpi4py."""
        assert self.master_addr is not None, "the master is determined before it is exported"
        values = {"RANK": self.rank,
                  "LOCAL_RANK": self.local_rank,
                  "WORLD_SIZE": self.world_size,
                  "MASTER_ADDR": self.master_addr,
                  "MASTER_PORT": self.master_port,
                  "LOCAL_SIZE": self.local_size}
        environ.update({key: str(value) for key, value in values.items() if value is not None})


@dataclass(frozen=True)
class _Source:
    """The variables of one launcher. Those in one tuple mean the same, and must have one value."""

    name: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...] = ()

    def is_present(self, environ: Mapping[str, str]) -> bool:
        """Whether the launcher's variables are set."""
        if self.name == "slurm":  # a batch script has SLURM_PROCID=0 too, but is not a job step
            return "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ
        # WORLD_SIZE without a rank is a variable of a job script. It is only compared later.
        return any(key in environ for key in (*self.rank, *self.local_rank))


# In order of preference.
SOURCES = (
    _Source("torch",
            rank=("RANK",),
            world_size=("WORLD_SIZE",),
            local_rank=("LOCAL_RANK",),
            local_size=("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    _Source("slurm",
            rank=("SLURM_PROCID",),
            world_size=("SLURM_STEP_NUM_TASKS",),
            local_rank=("SLURM_LOCALID",)),
    _Source("pmi",
            rank=("PMI_RANK", "PALS_RANKID"),
            world_size=("PMI_SIZE",),
            local_rank=("PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "MPI_LOCALRANKID"),
            local_size=("PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE", "MPI_LOCALNRANKS")),
    _Source("openmpi",
            rank=("OMPI_COMM_WORLD_RANK",),
            world_size=("OMPI_COMM_WORLD_SIZE",),
            local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
            local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",)),
)
# The innermost launcher first: srun starts the daemons of mpirun, and mpirun starts torchrun.
INNERMOST_FIRST = ("torch", "openmpi", "pmi", "slurm")


@dataclass(frozen=True)
class _Reading:
    """The values of one launcher's variables; None for a variable that is not set."""

    source: _Source
    rank: int | None
    world_size: int | None
    local_rank: int | None
    local_size: int | None

    @property
    def is_complete(self) -> bool:
        return None not in (self.rank, self.world_size, self.local_rank)

    def missing(self) -> Iterator[str]:
        """Yield the variables that are required and not set."""
        for field in ("rank", "local_rank", "world_size"):
            if getattr(self, field) is None:
                yield " or ".join(getattr(self.source, field))


def ranks_from_environment(environ: Mapping[str, str], nodefile: str = "") -> Ranks:
    """Return this process's ranks.

    The variables of torch are used if they are set, otherwise those of Slurm, then of PALS and PMI,
    then of Open MPI.

    nodefile: the text of the file that PBS_NODEFILE names.

    Raises ConfigError if no launcher's variables are set, one of them is missing, or two launchers
    disagree.
    """
    present = [_read(source, environ) for source in SOURCES if source.is_present(environ)]
    readings = _drop_outer_launchers(present)
    complete = [reading for reading in readings if reading.is_complete]
    if not complete:
        keys = ", ".join(readings[0].missing()) if readings else "RANK, LOCAL_RANK, WORLD_SIZE"
        problem = "not set: this process was not started by a launcher"
        if not readings and "SLURM_JOB_ID" in environ:
            problem = "not set: this is the batch script itself, not a launched rank"
        raise ConfigError("environment", keys, problem, HOW_TO_START)
    _check_agreement(readings, environ)

    first = complete[0]
    sizes = [reading.local_size for reading in complete if reading.local_size is not None]
    assert first.rank is not None
    assert first.local_rank is not None
    assert first.world_size is not None
    ranks = Ranks(first.rank, first.local_rank, first.world_size, sizes[0] if sizes else None,
                  source=first.source.name)
    _check_range(ranks, environ, first.source)
    return replace(ranks, master_addr=_master_addr(ranks, environ, nodefile),
                   master_port=_master_port(environ))


def _read(source: _Source, environ: Mapping[str, str]) -> _Reading:
    values = {}
    for field in FIELDS:
        texts = {key: environ[key] for key in getattr(source, field) if key in environ}
        try:
            numbers = {int(text) for text in texts.values()}
        except ValueError as exc:
            raise ConfigError("environment", texts, "is not an integer",
                              "fix the launcher's environment") from exc
        if len(numbers) > 1:
            raise ConfigError("environment", texts, "these variables disagree",
                              "unset what an earlier launcher left behind, or fix the launcher's "
                              "environment")
        values[field] = numbers.pop() if numbers else None
    if source.name == "slurm":
        values["local_size"] = _slurm_local_size(environ, values["world_size"])
    return _Reading(source, **values)


def _slurm_local_size(environ: Mapping[str, str], world_size: int | None) -> int | None:
    """Return the tasks on this node from SLURM_STEP_TASKS_PER_NODE, for example ``4(x15),3``."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE")
    if text is None or "SLURM_NODEID" not in environ:
        return None
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError("environment", {"SLURM_STEP_TASKS_PER_NODE": text},
                              "cannot be parsed", "start with srun")
        tasks += [int(match[1])] * int(match[2] or 1)
    text = environ["SLURM_NODEID"]
    node = int(text) if text.isdecimal() else len(tasks)
    if node >= len(tasks) or sum(tasks) != world_size:
        keys = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS")
        raise ConfigError("environment", {key: environ[key] for key in keys},
                          "these variables disagree", "start with srun")
    return tasks[node]


def _drop_outer_launchers(readings: list[_Reading]) -> list[_Reading]:
    """Drop an outer launcher (one process per host) if an inner launcher that it started disagrees.

    The ranks of mpirun in a Slurm job inherit the variables of srun, which started mpirun's
    daemons.
    """
    by_depth = sorted(readings, key=lambda reading: INNERMOST_FIRST.index(reading.source.name))
    inner = next((reading for reading in by_depth if reading.is_complete), None)
    if inner is None:
        return readings
    return [reading for reading in readings
            if reading is inner or reading.local_size != 1
            or (reading.rank, reading.world_size) == (inner.rank, inner.world_size)]


def _check_agreement(readings: list[_Reading], environ: Mapping[str, str]) -> None:
    for field in FIELDS:
        values = {reading.source: getattr(reading, field) for reading in readings}
        numbers = {number for number in values.values() if number is not None}
        if field == "world_size" and environ.get("WORLD_SIZE", "").isdecimal():
            numbers.add(int(environ["WORLD_SIZE"]))
        if len(numbers) > 1:
            keys = {key for source in (*values, SOURCES[0]) for key in getattr(source, field)
                    if key in environ}
            raise ConfigError("environment", {key: environ[key] for key in sorted(keys)},
                              "the variables of two launchers disagree",
                              "start with one launcher, and unset what the other left behind")


def _check_range(ranks: Ranks, environ: Mapping[str, str], source: _Source) -> None:
    size = ranks.world_size if ranks.local_size is None else ranks.local_size
    # Open MPI 5 assigns local ranks in another order than ranks, so LOCAL_RANK may exceed RANK.
    is_rank_valid = 0 <= ranks.rank < ranks.world_size
    is_local_rank_valid = 0 <= ranks.local_rank < size <= ranks.world_size
    if not (is_rank_valid and is_local_rank_valid):
        keys = (*source.rank, *source.local_rank, *source.world_size, *source.local_size)
        raise ConfigError("environment", {key: environ[key] for key in keys if key in environ},
                          "rank and size do not fit together",
                          "give each process its own RANK below WORLD_SIZE and LOCAL_RANK below "
                          "LOCAL_SIZE")


def _master_addr(ranks: Ranks, environ: Mapping[str, str], nodefile: str) -> str | None:
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    if ranks.local_size == ranks.world_size:
        return "127.0.0.1"
    if ranks.source == "torch":
        raise ConfigError("environment", "MASTER_ADDR", "not set",
                          "set MASTER_ADDR to the host of rank 0")
    for key in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        # The step of mpirun's daemons does not contain the host that mpirun itself runs on.
        if environ.get(key) and (ranks.source == "slurm" or key != "SLURM_STEP_NODELIST"):
            return expand_nodelist(environ[key])[0]
    return nodefile.split()[0] if nodefile.split() else None


def _master_port(environ: Mapping[str, str]) -> int:
    text = environ.get("MASTER_PORT")
    if text is not None:
        if not text.isdecimal() or not 0 < int(text) < 65536:
            raise ConfigError("environment", {"MASTER_PORT": text}, "is not a valid port",
                              "choose a port from 1024 to 65535")
        return int(text)
    job = re.match(r"\d+", environ.get("SLURM_JOB_ID") or environ.get("PBS_JOBID") or "")
    return JOB_PORTS[int(job[0]) % len(JOB_PORTS)] if job else DEFAULT_PORT
