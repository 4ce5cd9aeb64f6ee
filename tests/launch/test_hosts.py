from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from finetuning.errors import ConfigError, InternalError
from finetuning.launch.hosts import find_route, resolve_hosts
from finetuning.launch.processes import PRESETS, Launch, preset_file
from finetuning.launch.restarts import rendezvous_ok, run_with_restarts

KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "job-master-0",
    "PET_MASTER_PORT": "23456",
}


def test_kubeflow_says_it() -> None:
    machines = resolve_hosts(environ=KUBEFLOW)
    assert (machines.nnodes, machines.node_rank, machines.nproc) == (2, 1, "8")
    assert machines.flags() == [
        *("--machine_rank", "1", "--main_process_ip", "job-master-0", "--main_process_port", "23456"),
        *("--rdzv_backend", "c10d", "--rdzv_conf", "is_host=0,join_timeout=600"),
    ]


def test_the_first_machine_holds_the_meeting_point() -> None:
    first = resolve_hosts(2, 0, "127.0.0.1:1234", environ={})
    assert first.flags(5)[-1] == "is_host=1,join_timeout=5"
    told = {"PET_RDZV_ENDPOINT": "127.0.0.1:1234", "PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    assert first.environment({}) == told
    assert "GLOO_SOCKET_IFNAME" not in first.environment({"GLOO_SOCKET_IFNAME": "eth7"}), "what the user set stays"
    assert resolve_hosts(environ={}).environment({}) == {}
    assert find_route("no-such-host.invalid", 1) is None


@pytest.mark.parametrize(
    ("codes", "restarts", "expected", "told"),
    [
        ([203, 203, 0], 3, 0, 2),
        ([203, 203, 0], 1, 203, 1),
        ([203], 0, 203, 0),
        ([203, 143, 0], 3, 143, 1),
        ([1, 0], 3, 1, 0),
        ([3, 0], 3, 3, 0),
    ],
)
def test_only_what_nobody_can_mend_is_started_again(codes: list[int], restarts: int, expected: int, told: int) -> None:
    left, messages = iter(codes), []
    assert run_with_restarts(lambda: next(left), restarts, messages.append) == expected
    assert len(messages) == told


def test_machines_that_are_not_there_are_waited_for_and_then_named() -> None:
    def nobody() -> int:
        raise RendezvousConnectionError("nobody listens")

    with pytest.raises(InternalError, match=r"did not meet within 0 s.*nobody listens"):
        rendezvous_ok(nobody, 0)


@pytest.mark.parametrize("config", ["run_conf: {resume_from_checkpoint: false}", "method: sft"])
def test_restarts_need_checkpoints_to_go_on_from(run_cli: Any, tmp_path: Path, config: str) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(config)
    result = run_cli(["launch", "--max-restarts", "2", "sft", file])
    assert result.returncode == 1
    assert "resume_from_checkpoint: auto" in result.stderr


def test_slurm_says_it_inside_of_a_step_only() -> None:
    slurm = {"SLURM_NNODES": "4", "SLURM_NODEID": "3"}
    assert resolve_hosts(environ=slurm).nnodes == 1
    machines = resolve_hosts(address="first:1234", environ=slurm | {"SLURM_STEP_ID": "0"})
    assert (machines.nnodes, machines.node_rank, machines.address, machines.port) == (4, 3, "first", 1234)


def test_the_command_line_wins() -> None:
    assert resolve_hosts(1, 0, environ=KUBEFLOW).flags() == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [((2, 0, None), "an address to meet at"), ((2, 2, "a"), "from 0 to 1"), ((0, 0, None), "at least 1")],
)
def test_what_cannot_be(given: tuple[int, int, str | None], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        resolve_hosts(*given, environ={})


def test_words_for_numbers() -> None:
    with pytest.raises(ConfigError, match="not a whole number"):
        resolve_hosts(environ={"PET_NNODES": "two"})


@pytest.mark.parametrize("name", PRESETS)
def test_accelerate_takes_the_presets(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(preset_file("ddp").with_name(f"{name}.yaml")))
    assert config.mixed_precision == "no"
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
        # Otherwise accelerate would start all machines from the first by pdsh, where one launcher runs on each.
        assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"


def test_a_config_in_the_users_home_is_not_read() -> None:
    arguments = Launch(2).arguments(["sft", "c.yaml"])
    assert arguments[:2] == ["--config_file", str(preset_file("ddp"))]
    assert arguments[-4:] == ["--module", "finetuning.cli.main", "sft", "c.yaml"]
