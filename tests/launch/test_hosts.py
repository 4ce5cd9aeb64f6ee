"""Machines of a job, restarts, rendezvous and launcher presets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from finetuning.errors import ConfigError, InternalError
from finetuning.launch.hosts import find_route, resolve_hosts
from finetuning.launch.processes import PRESETS, Launch, job_end, preset_file
from finetuning.launch.restarts import JobEnd, retry_rendezvous, run_with_restarts
from finetuning.launch.signals import SignalForwarder, forward_signals, processes_of_job

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


SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
}
DSTACK = {
    "DSTACK_NODES_NUM": "2",
    "DSTACK_NODE_RANK": "1",
    "DSTACK_GPUS_PER_NODE": "8",
    "DSTACK_MASTER_NODE_IP": "10.0.0.1",
}

VOLCANO = {
    "VC_TASK_INDEX": "1",
    "VC_NODE_NUM": "2",
    "VC_NODE_HOSTS": "10.0.0.1,job-node-1.job",
    "PET_NPROC_PER_NODE": "8",
}


@pytest.mark.parametrize("environ", [SKYPILOT, DSTACK, VOLCANO])
def test_machines_come_from_the_variables_of_a_scheduler(environ: dict[str, str]) -> None:
    hosts = resolve_hosts(environ=environ)
    assert (hosts.nnodes, hosts.node_rank, hosts.nproc, hosts.address) == (2, 1, "8", "10.0.0.1")


def test_a_job_of_volcano_has_one_task() -> None:
    environ = VOLCANO | {"VC_MASTER_NUM": "1", "VC_MASTER_HOSTS": "10.0.0.9"}
    with pytest.raises(ConfigError, match="VC_MASTER_NUM, VC_NODE_NUM"):
        resolve_hosts(environ=environ)
    hosts = resolve_hosts(3, 2, "10.0.0.9", environ)
    assert (hosts.nnodes, hosts.node_rank, hosts.address) == (3, 2, "10.0.0.9")


def test_a_machine_of_skypilot_without_gpus_has_one_process() -> None:
    assert resolve_hosts(environ=SKYPILOT | {"SKYPILOT_NUM_GPUS_PER_NODE": "0"}).nproc == "auto"


def test_the_first_machine_hosts_the_rendezvous() -> None:
    first = resolve_hosts(2, 0, "127.0.0.1:1234", environ={})
    assert first.flags(5)[-1] == "is_host=1,join_timeout=5"
    expected = {"PET_RDZV_ENDPOINT": "127.0.0.1:1234", "PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    assert first.environment({}) == expected
    assert "GLOO_SOCKET_IFNAME" not in first.environment({"GLOO_SOCKET_IFNAME": "eth7"}), "what the user set stays"
    assert resolve_hosts(environ={}).environment({}) == {}
    assert find_route("no-such-host.invalid", 1) is None


BUG = {"error": "internal error: TypeError", "is_transient": False}
DEVICE = {"error": "internal error: RuntimeError: CUDA error"}


@pytest.mark.parametrize(
    ("ends", "restarts", "expected", "warnings"),
    [
        ([203, 203, 0], 3, 0, 2),
        ([203, 203, 0], 1, 203, 1),
        ([203], 0, 203, 0),
        ([203, 143, 0], 3, 143, 1),
        ([138, 0], 3, 138, 0),
        ([1, 0], 3, 1, 0),
        ([3, 0], 3, 3, 0),
        ([(203, BUG), 0], 3, 203, 1),
        ([(203, DEVICE), 0], 3, 0, 1),
        ([(203, DEVICE), (203, DEVICE), 0], 3, 203, 2),
        ([(203, DEVICE), 203, (203, DEVICE), 0], 3, 0, 3),
    ],
)
def test_only_what_may_succeed_is_restarted(
    monkeypatch: pytest.MonkeyPatch, ends: list[Any], restarts: int, expected: int, warnings: int
) -> None:
    monkeypatch.setattr("finetuning.launch.restarts._PAUSE_S", 0)
    results = [JobEnd(end) if isinstance(end, int) else JobEnd(end[0], **end[1]) for end in ends]
    remaining, messages = iter(results), []
    assert run_with_restarts(lambda: next(remaining), restarts, messages.append).exit_code == expected
    assert len(messages) == warnings


def test_a_restart_names_the_process_that_was_killed() -> None:
    ends, messages = iter([JobEnd(203, "rank 1 on host b was killed by signal 9 (SIGKILL)"), JobEnd(0)]), []
    run_with_restarts(lambda: next(ends), 2, messages.append)
    assert messages == ["rank 1 on host b was killed by signal 9 (SIGKILL): restart 1 of 2"]


@pytest.mark.parametrize(
    ("codes", "exit_code", "killed"),
    [
        # The others lose their connections at the same time.
        ({0: (203, 50), 1: (-9, 50)}, 203, "rank 1 "),
        ({0: (-11, 50), 1: (203, 51)}, 203, "rank 0 "),
        # The agent ends those that still run.
        ({0: (203, 50), 1: (-15, 50), 2: (-9, 80)}, 203, None),
        ({0: (1, 50), 1: (-15, 50)}, 1, None),
    ],
)
def test_a_process_that_was_killed_is_named_and_not_those_that_followed(
    codes: dict[int, tuple[int, int]], exit_code: int, killed: str | None
) -> None:
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=time) for rank, (code, time) in codes.items()}
    end = job_end(failures)  # pyright: ignore[reportArgumentType]
    assert end.exit_code == exit_code
    assert (end.killed or "").startswith(killed or "") and bool(end.killed) == bool(killed)


def test_missing_machines_fail_the_rendezvous_after_the_timeout() -> None:
    def connect() -> JobEnd:
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


@pytest.fixture
def sleeping_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process that looks like one of a job, in a session of its own as torch's agent starts it."""
    # The server from which the tests fork processes has the module of a rank in its command line, too.
    monkeypatch.setattr("finetuning.launch.signals.MODULE", "sleeping.rank")
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", "sleeping.rank"]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield process
        process.kill()


def test_the_first_signal_is_forwarded_once(sleeping_rank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    assert processes_of_job() == [sleeping_rank.pid], "other children of this process are not of the job"
    forwarder = SignalForwarder()
    # In a context: the fixture ends its process with os.kill.
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
        with pytest.raises(SignalException) as raised:
            forwarder.handle(signal.SIGUSR1, None)
        assert raised.value.sigval == signal.SIGUSR1
        forwarder.handle(signal.SIGTERM, None)
        assert sent == [(sleeping_rank.pid, signal.SIGUSR1)], "repeated at once, it is the same signal"
        forwarder._time = float("-inf")
        forwarder.handle(signal.SIGTERM, None)
    assert sent[1:] == [(sleeping_rank.pid, signal.SIGTERM)], "a later one does not end the launcher before its ranks"
    assert [forwarder.exit_code(code) for code in (0, 1, 203, 137)] == [0, 1, 138, 138]


def test_the_agent_of_torch_does_not_handle_signals_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    with forward_signals(300, environ):
        assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL
    assert environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] == "SIGQUIT"
    assert environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "295", "the launcher ends the ranks before it is ended itself"
    assert environ["FINETUNING_GRACE_S"] == "300", "the processes warn if a save takes longer"
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
