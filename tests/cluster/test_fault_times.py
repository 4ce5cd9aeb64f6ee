"""Every fault under every way to share a model out, and how long the job takes to end, or to train again.

The times are for the table of docs/reference/fault-tolerance.md, which `make test-cluster` writes: see
scripts/fault_table.py. Two processes of the CPU with gloo, FSDP2 by the same means as in
tests/end_to_end/test_sharded.py; or of two GPUs with NCCL (`make gpu-cluster-check`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from launched_job import DEVICE, ENVIRON, FSDP_SETUP, ON_GPUS, SAVED, SLOW_STEPS, Job, is_running, newest

HUNG_AFTER_S = 4.0
# Preset, code that each process executes first, and a file that its checkpoints have.
SHARDINGS = {
    "DDP": ("ddp", "", "optimizer.pt"),
    "FSDP2": ("fsdp2", FSDP_SETUP, "pytorch_model_fsdp_0/__1_*"),
    "ZeRO-2": ("zero2", "", "global_step*/zero_pp_rank_1_*_optim_states.pt"),
    "ZeRO-3": ("zero3", "", "global_step*/zero_pp_rank_1_*_model_states.pt"),
}
ALL_WEIGHTS = {"peft_conf": {"peft_type": "NO_PEFT"}, "run_conf.name_hung_after": HUNG_AFTER_S}


@dataclass
class Started:
    """A job on one host or two, and its output directory."""

    out: Path
    jobs: list[Job] = field(default_factory=list[Job])

    @property
    def output(self) -> str:
        return "".join(job.output for job in self.jobs)

    def pids(self) -> list[int]:
        return [pid for job in self.jobs for pid in (*job.ranks().values(), job.process.pid)]

    def lines(self) -> int:
        """How many losses were logged."""
        return len((self.out / "training_logs.jsonl").read_text().splitlines())

    def wait_for(self, condition: Callable[[], bool]) -> float:
        """Wait for a condition, and return after how many seconds it held."""
        began = time.monotonic()
        self.jobs[0].wait_for(condition)
        return time.monotonic() - began

    def seconds_to_end(self, began: float, code: int) -> float:
        assert [job.wait() for job in self.jobs] == [code] * len(self.jobs), self.output
        return time.monotonic() - began


@pytest.fixture(params=SHARDINGS)
def sharding(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name.startswith("ZeRO") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("see make test-cluster")
    return name


@pytest.fixture
def start(sft_values: Any, write_config: Any, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """A function that starts a job of two processes under a sharding: on this host, or one in each namespace."""
    started: list[Started] = []

    def run(sharding: str, namespaces: tuple[str, ...] = (), out: Path | None = None) -> Started:
        preset, before, file = SHARDINGS[sharding]
        job = Started(out or tmp_path / "out")
        started.append(job)
        config = write_config(sft_values({**SAVED, **DEVICE, **ALL_WEIGHTS, "training_args.output_dir": str(job.out)}))
        for rank, namespace in enumerate(namespaces or ("",)):
            options = ["--preset", preset, "--max-restarts", "1", "--nproc", "1" if namespace else "2"]
            if namespace:
                options += ["--nnodes", "2", "--node-rank", str(rank), "--main-address", "10.78.0.1:29512"]
            (tmp_path / f"host-{rank}").mkdir(exist_ok=True)
            prefix = ["ip", "netns", "exec", namespace] if namespace else []
            environ = ENVIRON | (gpu_of_host(rank) if namespace and ON_GPUS else {})
            folder = tmp_path / f"host-{rank}"
            job.jobs.append(Job(folder, config, options, before + SLOW_STEPS, prefix=prefix, environ=environ))
        job.wait_for(lambda: newest(job.out) >= 5)
        assert list(job.out.glob(f"checkpoint-*/{file}")), "or this is another way to share it out"
        return job

    yield run
    for job in started:
        for item in job.jobs:
            item.kill()


def gpu_of_host(rank: int) -> dict[str, str]:
    """Variables by which NCCL takes a process for one of a machine of its own, which only the cable leads to."""
    off = dict.fromkeys(("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"), "1")
    names = {"NCCL_HOSTID": f"host-{rank}", "NCCL_SOCKET_IFNAME": "cable"}
    return {"CUDA_VISIBLE_DEVICES": str(rank), **names, **off}


@pytest.fixture
def record(sharding: str, record_property: Any) -> Callable[..., None]:
    """A function that records the times of a fault in seconds, also for the table if `FAULT_TIMES` names a folder."""

    def write(fault: str, **seconds: float) -> None:
        rounded = {name: round(value, 1) for name, value in seconds.items()}
        record_property(f"{fault}, {sharding}", json.dumps(rounded))
        if folder := os.environ.get("FAULT_TIMES"):
            entry = {"fault": fault, "sharding": sharding, "seconds": rounded}
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, f"{fault}-{sharding}.json").write_text(json.dumps(entry))

    return write


def trains_again(job: Started) -> float:
    """Return how long it takes until a step is logged after the last restart."""
    lines = job.lines()
    seconds = job.wait_for(lambda: job.lines() > lines)
    assert "resumed after step" in job.output
    return seconds


def end(job: Started) -> None:
    """The job still saves when it is asked to end."""
    saved = newest(job.out)
    for item in job.jobs:
        item.process.send_signal(signal.SIGTERM)
    job.seconds_to_end(0, 143)
    assert newest(job.out) > saved


@pytest.mark.parametrize(("fault", "number"), [("kill", signal.SIGKILL), ("freeze", signal.SIGSTOP)])
def test_a_process_that_is_killed_or_frozen(
    start: Any, record: Any, sharding: str, fault: str, number: signal.Signals
) -> None:
    job = start(sharding)
    lost = job.jobs[0].ranks()[1]
    os.kill(lost, number)
    restarted = job.wait_for(lambda: "restart 1 of 1" in job.output)
    assert not is_running(lost)
    if fault == "freeze":
        assert "rank 1 on host" in job.output and "hangs: " in job.output
    else:
        assert "rank 1 on host" in job.output and "was killed by signal 9" in job.output
    record(fault, restart=restarted, trains=restarted + trains_again(job))
    end(job)


@pytest.mark.parametrize(
    ("fault", "number"), [("time limit", signal.SIGUSR1), ("preemption", signal.SIGTERM)], ids=["limit", "preemption"]
)
def test_the_end_of_the_time_and_preemption(
    start: Any, record: Any, sharding: str, fault: str, number: signal.Signals
) -> None:
    """SLURM sends SIGUSR1 to every process of a step before its limit; a preemption is SIGTERM to all of them."""
    job = start(sharding)
    saved, began = newest(job.out), time.monotonic()
    for pid in job.pids():
        os.kill(pid, number)
    record(fault, end=job.seconds_to_end(began, 128 + number))
    assert newest(job.out) > saved
    assert json.loads((job.out / "run.json").read_text())["status"] == "interrupted"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("a file system of its own needs the right to mount one")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(start: Any, record: Any, sharding: str, small_disk: Path, last_step: Any) -> None:
    job = start(sharding, out=small_disk / "out")
    filler = small_disk / "filler"
    with filler.open("wb") as stream:
        stream.write(bytes(shutil.disk_usage(small_disk).free - 400_000))
    warned = job.wait_for(lambda: "is not saved: no space left" in job.output)
    step = last_step(job.out)
    record("full disk", warning=warned, **{"goes on": warned + job.wait_for(lambda: last_step(job.out) > step)})
    filler.unlink()
    saved = newest(job.out)
    job.wait_for(lambda: newest(job.out) > saved)
    assert "restart" not in job.output
    end(job)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("only root can make network namespaces")
    first, second = (f"ftt{os.getpid()}-{rank}" for rank in (0, 1))
    try:
        for name in (first, second):
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for rank, name in enumerate((first, second)):
            ip("-n", name, "addr", "add", f"10.78.0.{rank + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield first, second
    finally:
        for name in (first, second):
            subprocess.run(["ip", "netns", "del", name], check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def test_a_cut_cable(start: Any, record: Any, sharding: str, namespaces: tuple[str, str]) -> None:
    job = start(sharding, namespaces)
    ip("-n", namespaces[1], "link", "set", "cable", "down")
    # The other side waits for the first one longer than this test does, if the cable stays cut.
    noticed = job.wait_for(lambda: "restart 1 of 1" in job.output)
    ip("-n", namespaces[1], "link", "set", "cable", "up")
    record("cut cable", restart=noticed, back=trains_again(job))
    end(job)
