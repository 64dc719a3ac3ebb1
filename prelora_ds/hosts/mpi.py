"""Rank discovery through mpi4py, only if the environment does not provide a rank or the master."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prelora_ds.errors import ConfigError, LaunchError
from prelora_ds.hosts.discovery import MPI_ENV_PREFIXES, Ranks, ranks_from_environment
from prelora_ds.hosts.network import address_towards, choose_interface, ipv4_of


def discover_ranks(environ: Mapping[str, str]) -> Ranks:
    """Return this process's ranks from the environment, otherwise from mpi4py.

    mpi4py is used only if the environment has no ranks, but variables of an MPI launcher. Raises
    ConfigError.
    """
    path = environ.get("PBS_NODEFILE")
    nodefile = Path(path).read_text() if path and Path(path).is_file() else ""
    try:
        return ranks_from_environment(environ, nodefile)
    except ConfigError as error:
        has_mpi = any(key.startswith(MPI_ENV_PREFIXES) for key in environ)
        if not error.problem.startswith("not set") or not has_mpi:
            raise
        try:
            ranks: Ranks = _query(_ranks_from_communicators)
        except ImportError:
            raise error from None
        # mpi4py uses another MPI library than the launcher: each process believes it is alone.
        if ranks.world_size == 1:
            raise error from None
        return ranks


def _ranks_from_communicators(world: Any, node: Any) -> Ranks:
    master_addr = "127.0.0.1"
    if world.rank == 0 and world.size > node.size:
        master_addr = own_address(None)
    return Ranks(world.rank, node.rank, world.size, node.size, source="mpi4py",
                 master_addr=world.bcast(master_addr))


def with_master_addr(ranks: Ranks, interface: str | None) -> Ranks:
    """Return ``ranks`` with the address of rank 0's host.

    Collective over MPI if the environment does not provide the address. Raises ConfigError.
    """
    if ranks.master_addr is not None:
        return ranks
    if interface is not None:
        choose_interface(interface, "", os.environ)

    def size_and_master(world: Any, node: Any) -> tuple[int, str]:
        return world.size, world.bcast(own_address(interface) if world.rank == 0 else None)

    try:
        size, addr = _query(size_and_master)
    except ImportError as exc:
        raise _no_master(str(exc)) from exc
    if size != ranks.world_size:
        raise _no_master("mpi4py uses a different MPI library than the launcher: it sees "
                         f"{size} of {ranks.world_size} ranks")
    return replace(ranks, master_addr=addr)


def _no_master(why: str) -> ConfigError:
    return ConfigError("environment", "MASTER_ADDR",
                       f"not set, and mpi4py cannot determine it: {why}",
                       "set it to the host of rank 0: `mpirun -x MASTER_ADDR=HOST`, "
                       "`mpiexec -genv MASTER_ADDR HOST` (MPICH, Intel MPI) or "
                       "`mpiexec --env MASTER_ADDR=HOST` (PALS)")


def own_address(interface: str | None) -> str:
    """Return an address at which other hosts reach this one.

    It is the address of the interface, otherwise of the host name, otherwise of the default route.
    Raises LaunchError if all of them are loopback addresses.
    """
    if interface is not None and (address := ipv4_of(interface)) is not None:
        return address
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "127.0.0.1"
    outward = address_towards("10.255.255.255") if address.startswith("127.") else address
    if outward is None or outward.startswith("127."):
        raise LaunchError(f"host {name}: its host name resolves to {address}\n"
                          "  remedy: set launch.interface, or MASTER_ADDR")
    return outward


def _query(function: Callable[[Any, Any], Any]) -> Any:
    """Return ``function(world, node)`` for MPI's communicators of all ranks and of this host's.

    MPI is finalized at once, so that a rank that fails later does not wait for the others in
    MPI_Finalize.

    Raises ImportError if mpi4py is not installed, or finds no MPI library.
    """
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except RuntimeError as exc:  # the wheel looks for the library on import
        raise ImportError(f"mpi4py finds no MPI library: {exc}") from exc

    MPI.Init()
    try:
        world = MPI.COMM_WORLD
        return function(world, world.Split_type(MPI.COMM_TYPE_SHARED))
    finally:
        MPI.Finalize()
