"""mpi4py, asked only where the environment does not tell a rank or the master."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prelora_ds.errors import ConfigError, LaunchError
from prelora_ds.hosts.discovery import MPI_ENV_PREFIXES, Ranks, ranks_from_environment
from prelora_ds.hosts.network import address_towards, choose_interface, ipv4_of


def discover_ranks(environ: Mapping[str, str]) -> Ranks:
    """`ranks_from_environment`; where nothing speaks but an MPI launcher left its traces, what mpi4py says."""
    path = environ.get("PBS_NODEFILE")
    nodefile = Path(path).read_text() if path and Path(path).is_file() else ""
    try:
        return ranks_from_environment(environ, nodefile)
    except ConfigError as error:
        if not error.problem.startswith("not set") or not any(key.startswith(MPI_ENV_PREFIXES) for key in environ):
            raise
        try:
            found: Ranks = _ask(lambda world, node: Ranks(
                world.rank, node.rank, world.size, node.size, source="mpi4py",
                master_addr=world.bcast(own_address(None) if world.rank == 0 and world.size > node.size
                                        else "127.0.0.1")))
        except ImportError:
            raise error from None
        if found.world_size == 1:  # mpi4py's library is not the launcher's: each process believes to be alone
            raise error from None
        return found


def with_master_addr(ranks: Ranks, interface: str | None) -> Ranks:
    """``ranks`` with the address of rank 0's host. Collective over MPI where the environment does not tell it."""
    if ranks.master_addr is not None:
        return ranks
    if interface is not None:
        choose_interface(interface, "", os.environ)
    try:
        size, addr = _ask(lambda world, node: (
            world.size, world.bcast(own_address(interface) if world.rank == 0 else None)))
    except ImportError as exc:
        raise _no_master(str(exc)) from exc
    if size != ranks.world_size:
        raise _no_master(f"its library is not that of the launcher, it sees {size} of {ranks.world_size} ranks")
    return replace(ranks, master_addr=addr)


def _no_master(why: str) -> ConfigError:
    return ConfigError("environment", "MASTER_ADDR", f"not set, and mpi4py cannot tell it: {why}",
                       "name the host of rank 0: `mpirun -x MASTER_ADDR=HOST`, `mpiexec -genv MASTER_ADDR HOST` "
                       "(MPICH, Intel MPI) or `mpiexec --env MASTER_ADDR=HOST` (PALS)")


def own_address(interface: str | None) -> str:
    """An address at which other hosts find this one: of the interface, else of its name, else of the route outwards."""
    if interface is not None and (address := ipv4_of(interface)) is not None:
        return address
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "127.0.0.1"
    outwards = address_towards("10.255.255.255") if address.startswith("127.") else address
    if outwards is None or outwards.startswith("127."):
        raise LaunchError(f"host {name}: its name points to {address}\n  remedy: set launch.interface, or MASTER_ADDR")
    return outwards


def _ask(question: Any) -> Any:
    """Put ``question`` to MPI's communicators (all, this host's) and leave MPI: a rank that fails later must not wait
    for the others in MPI_Finalize.

    Raises ImportError where mpi4py is not installed, or finds no MPI library.
    """
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except RuntimeError as exc:  # its wheel looks for the library when it is imported
        raise ImportError(f"mpi4py finds no MPI library: {exc}") from exc

    MPI.Init()
    try:
        world = MPI.COMM_WORLD
        return question(world, world.Split_type(MPI.COMM_TYPE_SHARED))
    finally:
        MPI.Finalize()
