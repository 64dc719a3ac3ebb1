"""Rank discovery, pure on the environment: what `deepspeed`, torchrun, srun and every mpirun say, held against each
other before anything can hang."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace

from prelora_ds.errors import ConfigError
from prelora_ds.hosts.hostfile import expand_nodelist

DEFAULT_PORT = 29500
# Job ids choose the port, so that two jobs on one host take two; below Linux' ephemeral ports (32768 and up).
JOB_PORTS = range(20000, 32000)
HOW_TO_START = "start with `deepspeed launch/pretrain.py ...`, torchrun, srun or mpiexec (docs/hpc.md)"
# What else an MPI launcher leaves; only then is mpi4py asked, whose MPI_Init aborts on many login nodes.
MPI_ENV_PREFIXES = ("PMIX_", "PMI_", "PALS_", "MPI_", "MV2_", "MPT_", "I_MPI_", "HYDRA_")


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job; ``master_addr`` is None where the environment does not tell it."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int | None = None
    master_addr: str | None = None
    master_port: int = DEFAULT_PORT
    source: str = "torch"

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Write what torch and DeepSpeed read; with these set, DeepSpeed never asks mpi4py."""
        assert self.master_addr is not None, "the master is found before it is exported"
        values = {"RANK": self.rank, "LOCAL_RANK": self.local_rank, "WORLD_SIZE": self.world_size,
                  "MASTER_ADDR": self.master_addr, "MASTER_PORT": self.master_port, "LOCAL_SIZE": self.local_size}
        environ.update({key: str(value) for key, value in values.items() if value is not None})


@dataclass(frozen=True)
class _Source:
    """The variables of one launcher; those in one tuple mean the same, and must say the same."""

    name: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...] = ()

    def is_present(self, environ: Mapping[str, str]) -> bool:
        if self.name == "slurm":  # a batch script has SLURM_PROCID=0 as well, but is no step
            return "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ
        # WORLD_SIZE alone is a job script's, for its own use; it is held against what is found.
        return any(key in environ for key in (*self.rank, *self.local_rank))


# In the order of preference.
SOURCES = (
    _Source("torch", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    _Source("slurm", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS",), ("SLURM_LOCALID",)),
    _Source("pmi", ("PMI_RANK", "PALS_RANKID"), ("PMI_SIZE",), ("PMI_LOCAL_RANK", "PALS_LOCAL_RANKID",
                                                                "MPI_LOCALRANKID"),
            ("PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE", "MPI_LOCALNRANKS")),
    _Source("openmpi", ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",),
            ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
)
# Which launcher runs inside which, where several speak: srun carries mpirun's daemons, mpirun carries torchrun.
INNERMOST_FIRST = ("torch", "openmpi", "pmi", "slurm")


@dataclass(frozen=True)
class _Reading:
    source: _Source
    rank: int | None
    world_size: int | None
    local_rank: int | None
    local_size: int | None

    @property
    def complete(self) -> bool:
        return None not in (self.rank, self.world_size, self.local_rank)

    def missing(self) -> Iterator[str]:
        for field in ("rank", "local_rank", "world_size"):
            if getattr(self, field) is None:
                yield " or ".join(getattr(self.source, field))


def ranks_from_environment(environ: Mapping[str, str], nodefile: str = "") -> Ranks:
    """This process's ranks: torch's variables, else Slurm's, else PALS's and PMI's, else Open MPI's.

    nodefile: the text of the file that PBS_NODEFILE names. Raises ConfigError where nothing speaks, something is
    missing, or two launchers contradict each other.
    """
    readings = _drop_outer_launchers([_read(source, environ) for source in SOURCES if source.is_present(environ)])
    complete = [reading for reading in readings if reading.complete]
    if not complete:
        keys = ", ".join(readings[0].missing()) if readings else "RANK, LOCAL_RANK, WORLD_SIZE"
        in_batch = not readings and "SLURM_JOB_ID" in environ
        raise ConfigError("environment", keys, "not set: this process was not launched" + (
            ", it is the batch script itself" if in_batch else ""), HOW_TO_START)
    _check_agreement(readings, environ)
    found = complete[0]
    sizes = [reading.local_size for reading in complete if reading.local_size is not None]
    assert found.rank is not None and found.local_rank is not None and found.world_size is not None
    ranks = Ranks(found.rank, found.local_rank, found.world_size, sizes[0] if sizes else None,
                  source=found.source.name)
    _check_range(ranks, environ, found.source)
    return replace(ranks, master_addr=_master_addr(ranks, environ, nodefile), master_port=_master_port(environ))


def _read(source: _Source, environ: Mapping[str, str]) -> _Reading:
    values = {}
    for field in ("rank", "world_size", "local_rank", "local_size"):
        said = {key: environ[key] for key in getattr(source, field) if key in environ}
        try:
            numbers = {int(text) for text in said.values()}
        except ValueError as exc:
            raise ConfigError("environment", said, "a rank is no number", "mend the launcher") from exc
        if len(numbers) > 1:
            raise ConfigError("environment", said, "these should say the same",
                              "unset what a former launcher left behind, or mend the launcher")
        values[field] = numbers.pop() if numbers else None
    if source.name == "slurm":
        values["local_size"] = _slurm_local_size(environ, values["world_size"])
    return _Reading(source, **values)


def _slurm_local_size(environ: Mapping[str, str], world_size: int | None) -> int | None:
    """Tasks on this node, of SLURM_STEP_TASKS_PER_NODE such as ``4(x15),3``."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE")
    if text is None or "SLURM_NODEID" not in environ:
        return None
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError("environment", {"SLURM_STEP_TASKS_PER_NODE": text}, "is no list of tasks", "use srun")
        tasks += [int(match[1])] * int(match[2] or 1)
    text = environ["SLURM_NODEID"]
    node = int(text) if text.isdecimal() else len(tasks)
    if node >= len(tasks) or sum(tasks) != world_size:
        raise ConfigError("environment", {key: environ[key] for key in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID",
                          "SLURM_STEP_NUM_TASKS")}, "ranks contradict each other", "start with srun itself")
    return tasks[node]


def _drop_outer_launchers(readings: list[_Reading]) -> list[_Reading]:
    """Leave out a launcher that started one process a host, when another one, started by that, says otherwise.

    The ranks of mpirun in a Slurm job inherit the variables of srun, which started mpirun's daemons.
    """
    by_depth = sorted(readings, key=lambda reading: INNERMOST_FIRST.index(reading.source.name))
    inner = next((reading for reading in by_depth if reading.complete), None)
    return [r for r in readings if inner is None or r is inner or r.local_size != 1
            or (r.rank, r.world_size) == (inner.rank, inner.world_size)]


def _check_agreement(readings: list[_Reading], environ: Mapping[str, str]) -> None:
    for field in ("rank", "world_size", "local_rank", "local_size"):
        said = {reading.source: getattr(reading, field) for reading in readings}
        numbers = {number for number in said.values() if number is not None}
        if field == "world_size" and environ.get("WORLD_SIZE", "").isdecimal():
            numbers.add(int(environ["WORLD_SIZE"]))
        if len(numbers) > 1:
            keys = {key for source in (*said, SOURCES[0]) for key in getattr(source, field) if key in environ}
            raise ConfigError("environment", {key: environ[key] for key in sorted(keys)},
                              "two launchers contradict each other",
                              "start with one launcher, and unset what the other left behind")


def _check_range(ranks: Ranks, environ: Mapping[str, str], source: _Source) -> None:
    size = ranks.world_size if ranks.local_size is None else ranks.local_size
    # Open MPI 5 gives out local ranks in another order than ranks, so LOCAL_RANK may be above RANK.
    if not (0 <= ranks.rank < ranks.world_size and 0 <= ranks.local_rank < size <= ranks.world_size):
        keys = (*source.rank, *source.local_rank, *source.world_size, *source.local_size)
        raise ConfigError("environment", {k: environ[k] for k in keys if k in environ}, "ranks contradict each other",
                          "each process needs a RANK below WORLD_SIZE and a LOCAL_RANK below LOCAL_SIZE of its own")


def _master_addr(ranks: Ranks, environ: Mapping[str, str], nodefile: str) -> str | None:
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    if ranks.local_size == ranks.world_size:
        return "127.0.0.1"
    if ranks.source == "torch":
        raise ConfigError("environment", "MASTER_ADDR", "not set", "name the host of rank 0 in MASTER_ADDR")
    for key in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        # A step of mpirun's daemons leaves out the host that mpirun itself runs on.
        if environ.get(key) and (ranks.source == "slurm" or key != "SLURM_STEP_NODELIST"):
            return expand_nodelist(environ[key])[0]
    return nodefile.split()[0] if nodefile.split() else None


def _master_port(environ: Mapping[str, str]) -> int:
    text = environ.get("MASTER_PORT")
    if text is not None:
        if not text.isdecimal() or not 0 < int(text) < 65536:
            raise ConfigError("environment", {"MASTER_PORT": text}, "is no port", "choose one from 1024 to 65535")
        return int(text)
    job = re.match(r"\d+", environ.get("SLURM_JOB_ID") or environ.get("PBS_JOBID") or "")
    return JOB_PORTS[int(job[0]) % len(JOB_PORTS)] if job else DEFAULT_PORT
