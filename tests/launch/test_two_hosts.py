"""Two machines, simulated by two network namespaces whose link can be cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from processes import ForkServer, Process

LAUNCH = ["launch", "--nproc", "1", "--nnodes", "2"]
ENTER = """
import ctypes, os
ctypes.CDLL(None, use_errno=True).setns(os.open("/run/netns/{name}", os.O_RDONLY), {CLONE_NEWNET})
"""
CLONE_NEWNET = 0x40000000
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
STEPS = 30


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@dataclass
class Host:
    """A network namespace, and its launchers: a new one comes up after the first was lost."""

    name: str
    rank: int
    fork_server: ForkServer
    launchers: list[Process] = field(default_factory=list[Process])

    def launch(self, config: Path, *overrides: str) -> None:
        location = ["--node-rank", str(self.rank), "--main-address", "10.77.0.1:29511"]
        command = [*LAUNCH, *location, "--max-restarts", "3", "sft", str(config), *overrides]
        enter = ENTER.format(name=self.name, CLONE_NEWNET=CLONE_NEWNET)
        self.launchers.append(self.fork_server.start(command, before=enter))

    def lose(self) -> None:
        """Everything that runs there is killed, and the cable pulled."""
        for process in ip("netns", "pids", self.name).split():
            os.kill(int(process), signal.SIGKILL)
        self.cable("down")
        assert self.launchers[-1].wait() == -signal.SIGKILL

    def cable(self, state: str) -> None:
        ip("-n", self.name, "link", "set", "cable", state)

    def code(self) -> int:
        return self.launchers[-1].wait()

    def said(self) -> str:
        return "".join(launcher.output for launcher in self.launchers)


@pytest.fixture
def hosts(fork_server: ForkServer) -> Iterator[tuple[Host, Host]]:
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces")
    pair = tuple(Host(f"ft{os.getpid()}-{rank}", rank, fork_server) for rank in (0, 1))
    first, second = pair
    made = []
    try:
        for host in pair:
            ip("netns", "add", host.name)
            made.append(host)
        ip("link", "add", "cable", "netns", first.name, "type", "veth", "peer", "name", "cable", "netns", second.name)
        for host in pair:
            ip("-n", host.name, "addr", "add", f"10.77.0.{host.rank + 1}/24", "dev", "cable")
            ip("-n", host.name, "link", "set", "lo", "up")
            host.cable("up")
        yield first, second
    finally:
        for host in made:
            for process in ip("netns", "pids", host.name).split():
                os.kill(int(process), signal.SIGKILL)
            ip("netns", "del", host.name)


@pytest.fixture
def values(sft_values: Any) -> dict[str, Any]:
    return sft_values(
        {
            "training_args.max_steps": STEPS,
            "training_args.save_strategy": "steps",
            "training_args.save_steps": 3,
            "batchsize_conf.max_per_device_train_batch_size": 1,
            "run_conf.resume_from_checkpoint": "auto",
            "peft_conf": LORA,
        }
    )


def losses(folder: Path) -> dict[int, float]:
    """Return the loss of each step; the last one if a step was repeated."""
    lines = (folder / "training_logs.jsonl").read_text().splitlines()
    data = [json.loads(line)["data"] for line in lines]
    return {record["step"]: record["value"] for record in data}


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.full)], ids=["the-first", "the-second"])
def test_a_host_that_is_lost_and_comes_back_leaves_the_curve_of_one_process(
    hosts: tuple[Host, Host], values: Any, train: Any, write_config: Any, tmp_path: Path, lost: int
) -> None:
    config = write_config(values)
    out = Path(values["training_args"]["output_dir"])
    for host in hosts:
        host.launch(config)
    log = out / "training_logs.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert all(host.launchers[-1].is_running for host in hosts), hosts[0].said() + hosts[1].said()
        time.sleep(0.02)
    hosts[lost].lose()
    hosts[lost].cable("up")
    hosts[lost].launch(config)
    assert [host.code() for host in hosts] == [0, 0], hosts[0].said() + hosts[1].said()
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "completed" and "checkpoint-" in record["resumed_from"]
    assert "4 = 2 x 1 x 2" in hosts[0].said() + hosts[1].said()
    values["training_args"]["output_dir"] = str(tmp_path / "alone")
    alone = losses(train(values).output_dir)
    assert len(alone) == STEPS
    assert losses(out) == pytest.approx(alone, abs=1e-4)


def test_hosts_that_do_not_share_the_output_directory_are_refused(
    hosts: tuple[Host, Host], values: Any, write_config: Any, tmp_path: Path
) -> None:
    config = write_config(values)
    hosts[0].launch(config)
    hosts[1].launch(config, f"training_args.output_dir={tmp_path / 'elsewhere'}")
    assert [host.code() for host in hosts] == [1, 1], hosts[0].said() + hosts[1].said()
    assert "is not shared by all hosts" in hosts[0].said()
    assert "restart" not in hosts[0].said()
