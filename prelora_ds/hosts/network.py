"""Which network interface a job talks over: one option for gloo, NCCL and MPI alike."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Mapping, MutableMapping

from prelora_ds.errors import ConfigError

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def interface_environment(interface: str) -> dict[str, str]:
    """The variables by which gloo, NCCL, Open MPI and MPICH (both layers of each) keep to ``interface``."""
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface,
            "OMPI_MCA_btl_tcp_if_include": interface, "PRTE_MCA_prte_if_include": interface,
            "FI_TCP_IFACE": interface, "HYDRA_IFACE": interface}


def choose_interface(interface: str | None, master_addr: str, environ: MutableMapping[str, str]) -> None:
    """Set the variables of ``launch.interface``; without one, gloo gets the interface that leads to the master.

    Left alone, gloo listens where the host's own name points, and Debian points that to 127.0.1.1. Raises ConfigError
    when the interface is not here, or a variable already names another one.
    """
    if interface is None:
        found = interface_towards(master_addr)
        if found is not None and found != "lo":
            environ.setdefault("GLOO_SOCKET_IFNAME", found)
        return
    names = [name for _, name in socket.if_nameindex()]
    if interface not in names:
        raise ConfigError("launch.interface", interface, f"is not on host {socket.gethostname()}",
                          f"choose one that all hosts have; here: {', '.join(names)}")
    _check_free(interface, environ)
    environ.update(interface_environment(interface))


def _check_free(interface: str, environ: Mapping[str, str]) -> None:
    for key in interface_environment(interface):
        if environ.get(key, interface) != interface:
            raise ConfigError("launch.interface", interface, f"and {key} = {environ[key]!r} contradict each other",
                              f"unset {key}, or leave out launch.interface")


def interface_towards(address: str, port: int = 9) -> str | None:
    """The interface by which this host would talk to ``address``; None when that is unknown. Sends nothing."""
    mine = address_towards(address, port)
    return None if mine is None else next((name for _, name in socket.if_nameindex() if ipv4_of(name) == mine), None)


def address_towards(address: str, port: int = 9) -> str | None:
    """This host's own address on the way to ``address``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))  # of a datagram socket: a look at the routes
        except OSError:
            return None
        return str(probe.getsockname()[0])


def ipv4_of(interface: str) -> str | None:
    """The first IPv4 address of ``interface``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])


def is_mine(address: str) -> bool:
    """Whether ``address`` (or name) belongs to this host: only then can a socket be bound to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
