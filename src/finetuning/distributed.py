"""Rank, world size and sharding, read from the launcher's environment variables; saying what a process waits for."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from finetuning.errors import ConfigError

logger = logging.getLogger(__name__)

WAIT_S, WAIT_AGAIN_S = 5.0, 60.0

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


def read_job_end_time(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return the time limit of the SLURM job in seconds since the epoch; None if there is none."""
    try:
        return float(environ["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return None


def _sharding(environ: Mapping[str, str]) -> Literal["fsdp", "deepspeed"] | None:
    def is_set(name: str) -> bool:
        return environ.get(name, "").lower() in ("1", "true", "yes", "on")

    return "fsdp" if is_set("ACCELERATE_USE_FSDP") else "deepspeed" if is_set("ACCELERATE_USE_DEEPSPEED") else None


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
