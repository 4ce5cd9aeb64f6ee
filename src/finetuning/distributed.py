"""Which process this is, among how many: the only reader of the launcher's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finetuning.errors import ConfigError

# torchrun and accelerate set the first name of each; srun and mpirun set the others.
_NAMES = {
    "rank": ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    "local_rank": ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
    "world_size": ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
}


@dataclass(frozen=True)
class ProcessTopology:
    """This process's global rank, its rank on this machine, and the number of processes of the job.

    `sharded_by` is what the launcher says will split the model over the processes.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    sharded_by: Literal["fsdp", "deepspeed"] | None = None

    @property
    def is_main(self) -> bool:
        """True on the one process that writes, prints and tracks."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1


def read_topology(environ: Mapping[str, str] = os.environ) -> ProcessTopology:
    """The topology that the launcher wrote into the environment; one process when it wrote none.

    A SLURM allocation counts only inside a job step (`srun`), which sets SLURM_STEP_ID: the batch script itself
    sees SLURM_NTASKS too, and is one process.

    Raises:
        ConfigError: a variable is not a number, or the rank is not below the world size.
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
    """When the scheduler ends the job, in seconds since 1970; None where it does not say."""
    try:
        return float(environ["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return None


def _sharding(environ: Mapping[str, str]) -> Literal["fsdp", "deepspeed"] | None:
    def says(name: str) -> bool:
        return environ.get(name, "").lower() in ("1", "true", "yes", "on")

    return "fsdp" if says("ACCELERATE_USE_FSDP") else "deepspeed" if says("ACCELERATE_USE_DEEPSPEED") else None
