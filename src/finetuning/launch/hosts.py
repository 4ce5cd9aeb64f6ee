"""Which machine of a job this is, from the command line or a scheduler's variables, and how the others reach it."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from finetuning.errors import ConfigError

RENDEZVOUS_TIMEOUT_S = 600
"""How long machines wait for each other."""
_DEFAULT_PORT = 29500
_VARIABLES = {
    # Kubeflow sets the first variable of each, which is torchrun's own; srun, SkyPilot, dstack and Volcano set theirs.
    # Those of Volcano have the name of the task in the place of *.
    "nnodes": ("PET_NNODES", "SLURM_NNODES", "SKYPILOT_NUM_NODES", "DSTACK_NODES_NUM", "VC_*_NUM"),
    "node_rank": ("PET_NODE_RANK", "SLURM_NODEID", "SKYPILOT_NODE_RANK", "DSTACK_NODE_RANK", "VC_TASK_INDEX"),
    "nproc": ("PET_NPROC_PER_NODE", "SKYPILOT_NUM_GPUS_PER_NODE", "DSTACK_GPUS_PER_NODE"),
    "address": ("PET_MASTER_ADDR", "MASTER_ADDR", "SKYPILOT_NODE_IPS", "DSTACK_MASTER_NODE_IP", "VC_*_HOSTS"),
    "port": ("PET_MASTER_PORT", "MASTER_PORT"),
}
_SIOCGIFADDR = 0x8915
"""Linux ioctl that returns the IPv4 address of a network interface."""


@dataclass(frozen=True)
class Hosts:
    """The number of machines, the rank of this one, and the address of the machine with rank 0."""

    nnodes: int = 1
    node_rank: int = 0
    address: str | None = None
    port: int = _DEFAULT_PORT
    nproc: str | None = None
    """Processes per machine as set in the environment: a number, `auto`, `gpu` or `cpu`."""

    def flags(self, timeout_s: int = RENDEZVOUS_TIMEOUT_S) -> list[str]:
        """Return the flags of `accelerate launch` that describe the machines; none for a single machine.

        The rendezvous backend is torchrun's c10d, with which a lost machine can rejoin; rank 0 hosts its store.
        """
        if self.nnodes == 1:
            return []
        return [
            *("--machine_rank", str(self.node_rank), "--main_process_ip", str(self.address)),
            *("--main_process_port", str(self.port), "--rdzv_backend", "c10d"),
            *("--rdzv_conf", f"is_host={int(self.node_rank == 0)},join_timeout={timeout_s}"),
        ]

    def environment(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Return the variables for torchrun and gloo that the user has not set: this machine's address and interface.

        By default both resolve the machine's own hostname, which on many machines is a loopback address.
        """
        if self.nnodes == 1:
            return {}
        variables = {"PET_RDZV_ENDPOINT": f"{self.address}:{self.port}"}
        route = find_route(str(self.address), self.port)
        if route:
            variables |= {"PET_LOCAL_ADDR": route.address, "GLOO_SOCKET_IFNAME": route.interface}
        return {name: value for name, value in variables.items() if not environ.get(name)}


@dataclass(frozen=True)
class Route:
    """This machine's IPv4 address on the route to another machine, and the interface that has it."""

    address: str
    interface: str


def find_route(host: str, port: int) -> Route | None:
    """Return the route to a machine, without sending anything.

    None if its name cannot be resolved, or it is only reachable by IPv6.
    """
    # Connecting a UDP socket only selects the route.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))
        except OSError:
            return None
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            if _interface_address(probe, name) == address:
                return Route(address, name)
    return None


def _interface_address(any_socket: socket.socket, interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    try:
        response = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
    except OSError:
        return None
    return socket.inet_ntoa(response[20:24])


def resolve_hosts(
    nnodes: int | None = None,
    node_rank: int | None = None,
    address: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Hosts:
    """Return the machines of the job; arguments override the environment.

    Args:
        address: HOST or HOST:PORT of the machine with rank 0.

    Raises:
        ConfigError: a value is not a number or out of range, several machines have no address, or a job of Volcano has
            several tasks.
    """
    host, _, port = (address or "").partition(":")
    hosts = Hosts(
        nnodes=_integer("nnodes", nnodes, environ, 1),
        node_rank=_integer("node_rank", node_rank, environ, 0),
        address=host or _variable("address", environ),
        port=_integer("port", port or None, environ, _DEFAULT_PORT),
        nproc=_variable("nproc", environ),
    )
    if hosts.nnodes < 1:
        raise ConfigError(f"--nnodes {hosts.nnodes}: must be at least 1")
    if not 0 <= hosts.node_rank < hosts.nnodes:
        raise ConfigError(f"--node-rank {hosts.node_rank}: must be from 0 to {hosts.nnodes - 1}")
    if hosts.nnodes > 1 and hosts.address is None:
        raise ConfigError(
            f"{hosts.nnodes} machines need the address of the first one",
            hint="Set --main-address HOST[:PORT], or the variable MASTER_ADDR, to the same value on each machine.",
        )
    return hosts


def _variable(field: str, environ: Mapping[str, str]) -> str | None:
    for name in _VARIABLES[field]:
        # sbatch sets some of these for the whole allocation; they describe this process only inside of srun.
        if name.startswith("SLURM_") and "SLURM_STEP_ID" not in environ:
            continue
        if value := environ.get(_name_of_task(name, environ) if "*" in name else name):
            # SkyPilot lists the addresses of all machines, a line each, and 0 GPUs of a machine without any; Volcano
            # separates them by commas.
            return "auto" if field == "nproc" and value == "0" else value.splitlines()[0].partition(",")[0]
    return None


def _name_of_task(pattern: str, environ: Mapping[str, str]) -> str:
    """Return the name of a variable that Volcano sets for a task; the pattern itself if there is none."""
    names = [name for name in environ if fnmatchcase(name, pattern)] if "VC_TASK_INDEX" in environ else []
    if len(names) > 1:
        raise ConfigError(
            f"the tasks of this Volcano job count their machines separately: {', '.join(sorted(names))}",
            hint="Use one task for all machines, or set --nnodes, --node-rank and --main-address.",
        )
    return names[0] if names else pattern


def _integer(field: str, argument: int | str | None, environ: Mapping[str, str], default: int) -> int:
    value = argument if argument is not None else _variable(field, environ)
    try:
        return default if value is None else int(value)
    except ValueError:
        raise ConfigError(f"{field}: {value!r} is not an integer") from None
