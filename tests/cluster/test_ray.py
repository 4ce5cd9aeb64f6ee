"""`finetuning launch --ray` on a real Ray cluster of two nodes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="see make test-cluster")
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
SAVED = {
    "peft_conf": LORA,
    "training_args.save_strategy": "steps",
    "training_args.save_steps": 5,
    "run_conf.resume_from_checkpoint": "auto",
    "batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 2},
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a cluster of two nodes, with a CPU each."""
    from ray.cluster_utils import Cluster

    # The nodes start the workers, which import the package.
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path[1:]), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        cluster.wait_for_nodes(60)
        yield cluster.address
    finally:
        cluster.shutdown()


class Job:
    """A job on the cluster."""

    def __init__(self, folder: Path, address: str, options: list[str], config: Path):
        self.log = folder / "job.log"
        command = [sys.executable, "-m", "finetuning.cli.main", "launch", "--ray", "--nnodes", "2", *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "sft", str(config)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"RAY_ADDRESS": address},
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.output
            time.sleep(0.1)


@pytest.fixture
def start(
    address: str, tmp_path: Path, sft_values: Any, write_config: Any
) -> Iterator[Callable[[list[str], dict[str, Any]], Job]]:
    jobs: list[Job] = []

    def run(options: list[str], changes: dict[str, Any]) -> Job:
        jobs.append(Job(tmp_path, address, options, write_config(sft_values({**SAVED, **changes}), "job.yaml")))
        return jobs[-1]

    yield run
    for job in jobs:
        job.process.kill()
        job.process.wait()


def workers() -> dict[int, list[str]]:
    """The command lines of the workers of Ray Train, by process id."""
    lines = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    split = [line.split() for line in lines]
    return {int(words[0]): words[1:] for words in split if "RayTrainWorker" in words[1]}


def processes_of(config: Path) -> list[str]:
    lines = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if str(config) in line and "--ray" not in line]


def test_a_killed_worker_comes_back_and_the_curve_is_that_of_one_process(
    start: Any, train: Any, sft_values: Any, losses: Any, last_step: Any, tmp_path: Path, record_property: Any
) -> None:
    out = tmp_path / "out"
    changes = {"training_args.max_steps": 40}
    job = start(["--max-restarts", "1"], changes)
    job.wait_for(lambda: last_step(out) >= 12)
    first, *_ = workers()
    began = time.monotonic()
    os.kill(first, signal.SIGKILL)
    job.wait_for(lambda: "restart 1 of 1" in job.output)
    record_property("seconds until the restart", f"{time.monotonic() - began:.1f}")
    assert job.process.wait(240) == 0, job.output
    assert "resumed after step" in job.output
    assert not processes_of(tmp_path / "job.yaml"), "nothing of the lost machine is left"
    alone = train(sft_values({**SAVED, **changes, "training_args.output_dir": str(tmp_path / "alone")}))
    expected, logged = losses(alone.output_dir), losses(out)
    assert logged.keys() == expected.keys()
    record_property("largest difference", f"{max(abs(logged[key] - expected[key]) for key in expected):.1e}")
    assert logged == pytest.approx(expected, abs=2e-5)


def test_a_signal_to_the_driver_saves_a_checkpoint(start: Any, last_step: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = start(["--max-restarts", "1"], {"training_args.max_steps": 100_000, "training_args.save_steps": 50_000})
    job.wait_for(lambda: last_step(out) >= 3)
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(120) == 143, job.output
    assert [path.name for path in out.glob("checkpoint-[0-9]*")], job.output


def test_an_error_of_the_config_is_not_tried_again(start: Any) -> None:
    job = start(["--max-restarts", "2"], {"training_args.learning_rat": 1})
    assert job.process.wait(120) == 1, job.output
    assert "learning_rat" in job.output and "restart 1" not in job.output
