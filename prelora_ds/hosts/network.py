"""The network interface of a job: one option for gloo, NCCL and MPI."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Mapping, MutableMapping

from prelora_ds.errors import ConfigError

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def interface_environment(interface: str) -> dict[str, str]:
    """Return the variables that bind gloo, NCCL, Open MPI and MPICH (both layers of each) to it."""
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface,
            "OMPI_MCA_btl_tcp_if_include": interface, "PRTE_MCA_prte_if_include": interface,
            "FI_TCP_IFACE": interface, "HYDRA_IFACE": interface}


def choose_interface(interface: str | None, master_addr: str,
                     environ: MutableMapping[str, str]) -> None:
    """Set the variables of ``launch.interface``.

    Without it, gloo gets the interface that leads to the master. By default gloo listens on the
    address that the host's own name resolves to, and on Debian that is 127.0.1.1.

    Raises ConfigError if this host does not have the interface, or a variable names another one.
    """
    if interface is None:
        towards_master = interface_towards(master_addr)
        if towards_master is not None and towards_master != "lo":
            environ.setdefault("GLOO_SOCKET_IFNAME", towards_master)
        return
    names = [name for _, name in socket.if_nameindex()]
    if interface not in names:
        raise ConfigError("launch.interface", interface,
                          f"does not exist on host {socket.gethostname()}",
                          f"choose one that all hosts have; this host has {', '.join(names)}")
    _check_no_conflict(interface, environ)
    environ.update(interface_environment(interface))


def _check_no_conflict(interface: str, environ: Mapping[str, str]) -> None:
    for key in interface_environment(interface):
        if environ.get(key, interface) != interface:
            raise ConfigError("launch.interface", interface,
                              f"conflicts with {key} = {environ[key]!r}",
                              f"unset {key}, or omit launch.interface")


def interface_towards(address: str, port: int = 9) -> str | None:
    """Return the interface that leads from this host to ``address``; None if unknown.

    Sends nothing.
    """
    mine = address_towards(address, port)
    if mine is None:
        return None
    return next((name for _, name in socket.if_nameindex() if ipv4_of(name) == mine), None)


def address_towards(address: str, port: int = 9) -> str | None:
    """Return this host's own address on the route to ``address``; None without a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))  # UDP connect only looks up the route
        except OSError:
            return None
        return str(probe.getsockname()[0])


def ipv4_of(interface: str) -> str | None:
    """Return the first IPv4 address of ``interface``; None if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])


def is_mine(address: str) -> bool:
    """Whether ``address`` (or name) belongs to this host, so that a socket can be bound to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
