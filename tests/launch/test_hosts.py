"""Machines of a job, restarts, rendezvous and launcher presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from finetuning.errors import ConfigError, InternalError
from finetuning.launch.hosts import find_route, resolve_hosts
from finetuning.launch.processes import PRESETS, Launch, preset_file
from finetuning.launch.restarts import retry_rendezvous, run_with_restarts

KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "job-master-0",
    "PET_MASTER_PORT": "23456",
}


def test_machines_come_from_kubeflow() -> None:
    hosts = resolve_hosts(environ=KUBEFLOW)
    assert (hosts.nnodes, hosts.node_rank, hosts.nproc) == (2, 1, "8")
    assert hosts.flags() == [
        *("--machine_rank", "1", "--main_process_ip", "job-master-0", "--main_process_port", "23456"),
        *("--rdzv_backend", "c10d", "--rdzv_conf", "is_host=0,join_timeout=600"),
    ]


def test_the_first_machine_hosts_the_rendezvous() -> None:
    first = resolve_hosts(2, 0, "127.0.0.1:1234", environ={})
    assert first.flags(5)[-1] == "is_host=1,join_timeout=5"
    expected = {"PET_RDZV_ENDPOINT": "127.0.0.1:1234", "PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    assert first.environment({}) == expected
    assert "GLOO_SOCKET_IFNAME" not in first.environment({"GLOO_SOCKET_IFNAME": "eth7"}), "what the user set stays"
    assert resolve_hosts(environ={}).environment({}) == {}
    assert find_route("no-such-host.invalid", 1) is None


@pytest.mark.parametrize(
    ("codes", "restarts", "expected", "warnings"),
    [
        ([203, 203, 0], 3, 0, 2),
        ([203, 203, 0], 1, 203, 1),
        ([203], 0, 203, 0),
        ([203, 143, 0], 3, 143, 1),
        ([1, 0], 3, 1, 0),
        ([3, 0], 3, 3, 0),
    ],
)
def test_only_internal_errors_are_restarted(codes: list[int], restarts: int, expected: int, warnings: int) -> None:
    remaining, messages = iter(codes), []
    assert run_with_restarts(lambda: next(remaining), restarts, messages.append) == expected
    assert len(messages) == warnings


def test_missing_machines_fail_the_rendezvous_after_the_timeout() -> None:
    def connect() -> int:
        raise RendezvousConnectionError("nobody listens")

    with pytest.raises(InternalError, match=r"did not rendezvous within 0 s.*nobody listens"):
        retry_rendezvous(connect, 0)


@pytest.mark.parametrize("config", ["run_conf: {resume_from_checkpoint: false}", "method: sft"])
def test_restarts_require_resuming(run_cli: Any, tmp_path: Path, config: str) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(config)
    result = run_cli(["launch", "--max-restarts", "2", "sft", file])
    assert result.returncode == 1
    assert "resume_from_checkpoint: auto" in result.stderr


def test_slurm_variables_count_inside_a_step_only() -> None:
    slurm = {"SLURM_NNODES": "4", "SLURM_NODEID": "3"}
    assert resolve_hosts(environ=slurm).nnodes == 1
    hosts = resolve_hosts(address="first:1234", environ=slurm | {"SLURM_STEP_ID": "0"})
    assert (hosts.nnodes, hosts.node_rank, hosts.address, hosts.port) == (4, 3, "first", 1234)


def test_the_command_line_wins() -> None:
    assert resolve_hosts(1, 0, environ=KUBEFLOW).flags() == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((2, 0, None), "the address of the first one"), ((2, 2, "a"), "from 0 to 1"), ((0, 0, None), "at least 1")],
)
def test_invalid_machines(arguments: tuple[int, int, str | None], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        resolve_hosts(*arguments, environ={})


def test_text_instead_of_a_number() -> None:
    with pytest.raises(ConfigError, match="is not an integer"):
        resolve_hosts(environ={"PET_NNODES": "two"})


@pytest.mark.parametrize("name", PRESETS)
def test_accelerate_reads_the_presets(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(preset_file("ddp").with_name(f"{name}.yaml")))
    assert config.mixed_precision == "no"
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
        # By default accelerate would start all machines from the first one with pdsh.
        assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"


def test_the_accelerate_config_in_the_home_folder_is_ignored() -> None:
    arguments = Launch(2).arguments(["sft", "c.yaml"])
    assert arguments[:2] == ["--config_file", str(preset_file("ddp"))]
    assert arguments[-4:] == ["--module", "finetuning.cli.main", "sft", "c.yaml"]
