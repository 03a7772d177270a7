"""Which of a host's addresses and interfaces ranks speak through: the one that leads to rank 0, never a guess by name.

A host's own name may resolve to loopback (Debian writes 127.0.1.1 into /etc/hosts), to nothing, or to a network that
the other nodes cannot reach. A route always exists, or the job could not run.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence

import psutil

from configs.errors import ConfigError


def family_of(address: str) -> socket.AddressFamily:
    """IPv4 or IPv6, whichever an address or a name is of."""
    try:
        return socket.getaddrinfo(address, None, type=socket.SOCK_DGRAM)[0][0]
    except OSError as error:
        raise ConfigError(
            f"{socket.gethostname()} cannot resolve {address} ({error.strerror}); give nodes an address (NodeAddr) or a"
            " name that resolves on every node"
        ) from None


def own_address_towards(address: str, port: int = 9) -> str:
    """This host's address on the way to another; nothing is sent."""
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
        except OSError as error:
            raise ConfigError(
                f"{socket.gethostname()} has no route to {address} ({error.strerror}); check the network of this node"
            ) from None
        return str(probe.getsockname()[0])


def address_of_first(addresses: Sequence[str]) -> str:
    """Of nodes the first one's address, where the others reach it: on that node its own name may lead to loopback."""
    first, *others = addresses
    if not others or not _is_loopback(own_address_towards(first)):
        return first
    own = own_address_towards(others[0])
    return first if _is_loopback(own) else own  # all of them may be on this machine


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def interface_towards(address: str) -> str:
    """The name of the interface on the way to an address."""
    own = own_address_towards(address).split("%")[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == own for entry in addresses):
            return name
    raise ConfigError(f"no interface of {socket.gethostname()} has its own address {own}; check `ip address`")


def free_port(host: str) -> int:
    """A port that nobody has at an address of this host's own; for another host's, one that nobody has here."""
    with socket.socket(family_of(host), socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            probe.bind(("", 0))
        return int(probe.getsockname()[1])
