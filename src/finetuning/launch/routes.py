"""The address and the network interface by which this machine reaches another one."""

from __future__ import annotations

import fcntl
import socket
import struct
from dataclasses import dataclass

_ADDRESS_OF_INTERFACE = 0x8915
"""SIOCGIFADDR of Linux: the IPv4 address of an interface that is named."""


@dataclass(frozen=True)
class Route:
    """This machine's own IPv4 address towards another machine, and the interface that has it."""

    address: str
    interface: str


def find_route(host: str, port: int) -> Route | None:
    """The way to a machine; None when its name is not known here, or it is reached by IPv6 alone.

    Nothing is sent.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
        try:
            towards.connect((host, port))
        except OSError:
            return None
        address = towards.getsockname()[0]
        for _, name in socket.if_nameindex():
            if _address_of(towards, name) == address:
                return Route(address, name)
    return None


def _address_of(any_socket: socket.socket, interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    try:
        answer = fcntl.ioctl(any_socket.fileno(), _ADDRESS_OF_INTERFACE, request)
    except OSError:
        return None
    return socket.inet_ntoa(answer[20:24])
