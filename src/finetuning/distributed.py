"""Rank, world size and sharding, read from the launcher's environment variables; saying what a process waits for."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetuning.errors import CommunicationError, ConfigError, first_line, is_out_of_memory

logger = logging.getLogger(__name__)

WAIT_S, WAIT_AGAIN_S = 5.0, 60.0

GRACE_VARIABLE = "FINETUNING_GRACE_S"
DEFAULT_GRACE_S = 300
"""How long after its signal a scheduler kills a job: the files in `deploy/` have the same number."""
REPEAT_S = 5.0
"""Signals within this time are one: a scheduler signals every process of a job, and the launcher passes it on."""

# In order of precedence: torchrun and accelerate, then srun, Open MPI, and other MPI launchers.
_NAMES = {
    "rank": ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    "local_rank": ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
    "world_size": ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
}


@dataclass(frozen=True)
class ProcessTopology:
    """Global rank, rank on this node, and number of processes of the job.

    `sharded_by` is set if accelerate was launched with FSDP or DeepSpeed.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    sharded_by: Literal["fsdp", "deepspeed"] | None = None

    @property
    def is_main(self) -> bool:
        """True on global rank 0, which alone saves files, prints and tracks."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1


def read_topology(environ: Mapping[str, str] = os.environ) -> ProcessTopology:
    """Return the topology that the launcher set in the environment; a single process if it set none.

    SLURM variables are read only inside a job step (`srun`), which sets SLURM_STEP_ID. The batch script itself is a
    single process although SLURM_NTASKS is set there as well.

    Raises:
        ConfigError: a variable is not an integer, or the rank is not below the world size.
    """
    values = {}
    for field, names in _NAMES.items():
        for name in names:
            if name.startswith("SLURM_") and "SLURM_STEP_ID" not in environ:
                continue
            if environ.get(name, "") != "":
                try:
                    values[field] = int(environ[name])
                except ValueError:
                    raise ConfigError(f"environment variable {name}={environ[name]!r} is not a whole number") from None
                break
    topology = ProcessTopology(**values, sharded_by=_sharding(environ))
    if not 0 <= topology.rank < max(topology.world_size, 1):
        raise ConfigError(
            f"the launcher's environment says rank {topology.rank} of {topology.world_size} processes;"
            " RANK must be below WORLD_SIZE"
        )
    return topology


def set_torchrun_variables(topology: ProcessTopology, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that torch and accelerate read, which srun and mpirun do not set.

    Raises:
        ConfigError: the address of rank 0 or the rank of this process is unknown.
    """
    if not any(environ.get(name) for name in _NAMES["rank"]):
        raise ConfigError(
            f"the environment says {topology.world_size} processes, but not which one this is: RANK is unset",
            hint="Start the processes with finetuning launch, torchrun, accelerate launch, srun or mpirun.",
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"process {topology.rank} of {topology.world_size} does not know how to reach process 0:"
            f" {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set",
            hint="Set MASTER_ADDR to the host of process 0 and MASTER_PORT to a free port there, to the same values for"
            " every process. finetuning launch and torchrun do so themselves.",
        )
    values = {"RANK": topology.rank, "LOCAL_RANK": topology.local_rank, "WORLD_SIZE": topology.world_size}
    for name, value in values.items():
        environ.setdefault(name, str(value))


def find_launch_mistake(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return why this is a single process although its launcher may have been asked for several; None if it is fine."""
    if _is_set(environ, "ACCELERATE_USE_CPU") and not environ.get("WORLD_SIZE"):
        return (
            "accelerate launch --cpu starts a single process, whatever --num_processes says."
            " finetuning launch --nproc N, or --multi_gpu instead of --cpu, starts several"
        )
    return None


def has_gpu_driver(devices: Path = Path("/dev")) -> bool:
    """Return whether this machine has the driver of a GPU. Asks the file system: importing torch takes seconds."""
    return (devices / "kfd").exists() or any(devices.glob("nvidia[0-9]*"))


def read_job_end_time(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return the time limit of the SLURM job in seconds since the epoch; None if there is none."""
    try:
        return float(environ["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return None


def read_grace(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many seconds a scheduler leaves between its signal and the end of the job.

    Raises:
        ConfigError: the variable is not a positive whole number.
    """
    text = environ.get(GRACE_VARIABLE) or str(DEFAULT_GRACE_S)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"environment variable {GRACE_VARIABLE}={text!r} is not a positive whole number of seconds")
    return int(text)


def _sharding(environ: Mapping[str, str]) -> Literal["fsdp", "deepspeed"] | None:
    if _is_set(environ, "ACCELERATE_USE_FSDP"):
        return "fsdp"
    return "deepspeed" if _is_set(environ, "ACCELERATE_USE_DEEPSPEED") else None


def _is_set(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes", "on")


@contextmanager
def announce_wait(what: str, after_s: float = WAIT_S) -> Iterator[None]:
    """Log what the block waits for: after some seconds, and then every minute. A short wait is not mentioned."""
    began, is_over = time.monotonic(), threading.Event()

    def report() -> None:
        pause_s = after_s
        while not is_over.wait(pause_s):
            logger.warning("waiting for %s, for %.0f s so far", what, time.monotonic() - began)
            pause_s = WAIT_AGAIN_S

    threading.Thread(target=report, name="announce wait", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


@contextmanager
def connecting_processes() -> Iterator[None]:
    """Log a wait for the other processes of the job, which the block connects to.

    Raises:
        CommunicationError: they cannot be reached.
    """
    try:
        with announce_wait("the other processes of the job to connect"):
            yield
    except RuntimeError as error:
        # Errors of torch's stores and backends are RuntimeErrors, and gloo's are not even classes of their own.
        if is_out_of_memory(error) or "CUDA error" in str(error):
            raise
        raise CommunicationError(
            f"the processes of the job cannot connect: {first_line(error)}",
            hint="Their addresses and ports must be reachable from all machines. Where a machine's name resolves to a"
            " loopback address, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to its network interface; finetuning"
            " launch sets the first.",
        ) from error
