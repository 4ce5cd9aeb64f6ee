from __future__ import annotations

import pytest

from finetuning.errors import ConfigError
from finetuning.launch.machines import find_machines
from finetuning.launch.processes import PRESETS, Launch, preset_file

KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "job-master-0",
    "PET_MASTER_PORT": "23456",
}


def test_kubeflow_says_it() -> None:
    machines = find_machines(environ=KUBEFLOW)
    assert (machines.nnodes, machines.node_rank, machines.nproc) == (2, 1, "8")
    assert machines.flags() == [
        *("--machine_rank", "1", "--main_process_ip", "job-master-0", "--main_process_port", "23456")
    ]


def test_slurm_says_it_inside_of_a_step_only() -> None:
    slurm = {"SLURM_NNODES": "4", "SLURM_NODEID": "3"}
    assert find_machines(environ=slurm).nnodes == 1
    machines = find_machines(address="first:1234", environ=slurm | {"SLURM_STEP_ID": "0"})
    assert (machines.nnodes, machines.node_rank, machines.address, machines.port) == (4, 3, "first", 1234)


def test_the_command_line_wins() -> None:
    assert find_machines(1, 0, environ=KUBEFLOW).flags() == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [((2, 0, None), "an address to meet at"), ((2, 2, "a"), "from 0 to 1"), ((0, 0, None), "at least 1")],
)
def test_what_cannot_be(given: tuple[int, int, str | None], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        find_machines(*given, environ={})


def test_words_for_numbers() -> None:
    with pytest.raises(ConfigError, match="not a whole number"):
        find_machines(environ={"PET_NNODES": "two"})


@pytest.mark.parametrize("name", PRESETS)
def test_accelerate_takes_the_presets(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(preset_file("ddp").with_name(f"{name}.yaml")))
    assert config.mixed_precision == "no"
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_a_config_in_the_users_home_is_not_read() -> None:
    arguments = Launch(2).arguments(["sft", "c.yaml"])
    assert arguments[:2] == ["--config_file", str(preset_file("ddp"))]
    assert arguments[-4:] == ["--module", "finetuning.cli.finetuning", "sft", "c.yaml"]
