"""The launcher's environment, however it launched."""

from __future__ import annotations

import pytest

from finetuning.distributed import ProcessTopology, read_topology
from finetuning.errors import ConfigError


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ProcessTopology()),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, ProcessTopology(3, 1, 8)),
        ({"RANK": "", "WORLD_SIZE": ""}, ProcessTopology()),
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}, ProcessTopology()),
        (
            {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"},
            ProcessTopology(2, 0, 4),
        ),
        (
            {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"},
            ProcessTopology(1, 1, 2),
        ),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, ProcessTopology(1, 0, 2)),
        ({"ACCELERATE_USE_FSDP": "true"}, ProcessTopology(sharded_by="fsdp")),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, ProcessTopology(sharded_by="deepspeed")),
        ({"ACCELERATE_USE_FSDP": "false"}, ProcessTopology()),
    ],
)
def test_topology_of(environ: dict[str, str], expected: ProcessTopology) -> None:
    topology = read_topology(environ)
    assert topology == expected
    assert topology.is_main == (expected.rank == 0)
    assert topology.is_distributed == (expected.world_size > 1)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "two"}, "environment variable WORLD_SIZE='two' is not a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "rank -1 of 2"),
    ],
)
def test_an_environment_that_cannot_be(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_topology(environ)
