"""Which machine of a job this is: from the command line, or from what Kubeflow and SLURM say.

The address and the network interface by which this machine reaches another one."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from finetuning.errors import ConfigError

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


# Kubeflow sets the first name of each (torchrun's own), srun the others.
_NAMES = {
    "nnodes": ("PET_NNODES", "SLURM_NNODES"),
    "node_rank": ("PET_NODE_RANK", "SLURM_NODEID"),
    "nproc": ("PET_NPROC_PER_NODE",),
    "address": ("PET_MASTER_ADDR", "MASTER_ADDR"),
    "port": ("PET_MASTER_PORT", "MASTER_PORT"),
}
_DEFAULT_PORT = 29500
MEET_WITHIN_S = 600
"""How long machines wait for each other."""


@dataclass(frozen=True)
class Hosts:
    """How many machines there are, which this is, and where the first one listens."""

    nnodes: int = 1
    node_rank: int = 0
    address: str | None = None
    port: int = _DEFAULT_PORT
    nproc: str | None = None
    """Processes on each machine, where the environment says it: a number, or `auto`, `gpu`, `cpu`."""

    def flags(self, meet_within_s: int = MEET_WITHIN_S) -> list[str]:
        """What `accelerate launch` is told about machines; nothing for one.

        They meet by torchrun's rendezvous c10d, which lets a machine that was lost come back; the first machine holds
        its store.
        """
        if self.nnodes == 1:
            return []
        return [
            *("--machine_rank", str(self.node_rank), "--main_process_ip", str(self.address)),
            *("--main_process_port", str(self.port), "--rdzv_backend", "c10d"),
            *("--rdzv_conf", f"is_host={int(self.node_rank == 0)},join_timeout={meet_within_s}"),
        ]

    def environment(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """What torchrun and gloo are told, where nobody has: the address at which the others reach this machine, and
        its interface.

        They would look the machine's own name up, and many machines know that as a loopback address.
        """
        if self.nnodes == 1:
            return {}
        told = {"PET_RDZV_ENDPOINT": f"{self.address}:{self.port}"}
        route = find_route(str(self.address), self.port)
        if route:
            told |= {"PET_LOCAL_ADDR": route.address, "GLOO_SOCKET_IFNAME": route.interface}
        return {name: value for name, value in told.items() if not environ.get(name)}


def resolve_hosts(
    nnodes: int | None = None,
    node_rank: int | None = None,
    address: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Hosts:
    """The machines, each value as given or else as the environment has it; `address` is host or host:port.

    Raises:
        ConfigError: a value is no number or out of its range, or several machines have no address to meet at.
    """
    host, _, given_port = (address or "").partition(":")
    machines = Hosts(
        nnodes=_number("nnodes", nnodes, environ, 1),
        node_rank=_number("node_rank", node_rank, environ, 0),
        address=host or _text("address", environ),
        port=_number("port", given_port or None, environ, _DEFAULT_PORT),
        nproc=_text("nproc", environ),
    )
    if machines.nnodes < 1:
        raise ConfigError(f"--nnodes {machines.nnodes}: must be at least 1")
    if not 0 <= machines.node_rank < machines.nnodes:
        raise ConfigError(f"--node-rank {machines.node_rank}: must be from 0 to {machines.nnodes - 1}")
    if machines.nnodes > 1 and machines.address is None:
        raise ConfigError(
            f"{machines.nnodes} machines need an address to meet at",
            hint="Give --main-address HOST[:PORT], the first machine's, on each of them.",
        )
    return machines


def _text(field: str, environ: Mapping[str, str]) -> str | None:
    for name in _NAMES[field]:
        if name.startswith("SLURM_") and "SLURM_STEP_ID" not in environ:
            continue
        if environ.get(name):
            return environ[name]
    return None


def _number(field: str, given: int | str | None, environ: Mapping[str, str], default: int) -> int:
    value = given if given is not None else _text(field, environ)
    try:
        return default if value is None else int(value)
    except ValueError:
        raise ConfigError(f"{field}: {value!r} is not a whole number") from None
