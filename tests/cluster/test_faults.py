"""What ends a job of two processes: signals to any of its processes, a frozen one, a killed one, a slow save."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import SECONDS

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
SAVED = {
    "peft_conf": LORA,
    "training_args.max_steps": 100_000,
    "training_args.save_strategy": "steps",
    "training_args.save_steps": 5,
    "training_args.save_total_limit": 2,
    "run_conf.resume_from_checkpoint": "auto",
    "batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 1},
}
# A step of 20 ms or more, whatever the machine.
SLOW_STEPS = """
import time
from transformers import TrainerCallback
from finetuning.training.signals import StopOnSignal
_end = StopOnSignal.on_step_end
def slow(self, args, state, control, **kwargs):
    time.sleep(0.02)
    return _end(self, args, state, control, **kwargs)
StopOnSignal.on_step_end = slow
"""
SLOW_SAVES = """
import time
from finetuning.trainer import checkpointing
_publish = checkpointing.publish
def slow(*arguments):
    time.sleep(SECONDS)
    return _publish(*arguments)
checkpointing.publish = slow
"""


class Job:
    """`finetuning launch` with two processes, in a session of its own."""

    def __init__(self, folder: Path, config: Path, options: list[str], before: str, overrides: list[str]):
        site = folder / "site"
        site.mkdir(exist_ok=True)
        # Executed by every process of the job before anything else.
        (site / "sitecustomize.py").write_text(
            f"import os\nif os.environ.get('RANK'):\n    exec({before!r})\n" if before else ""
        )
        self.log = folder / "job.log"
        path = os.pathsep.join([str(site), *sys.path[1:]])
        command = [sys.executable, "-m", "finetuning.cli.main", "launch", "--nproc", "2", *options, "sft", str(config)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *overrides],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> dict[int, int]:
        """The process ids of the ranks."""
        pids = {}
        for pid in children_of(self.process.pid):
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            for variable in variables:
                if variable.startswith(b"RANK="):
                    pids[int(variable[5:])] = pid
        return pids

    def wait(self) -> int:
        return self.process.wait(timeout=SECONDS)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.fixture
def start(sft_values: Any, write_config: Any, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """A function that starts a job whose output directory is `tmp_path / "out"`."""
    jobs: list[Job] = []

    def run(options: list[str], changes: Any = None, before: str = SLOW_STEPS, overrides: Any = ()) -> Job:
        config = write_config(sft_values({**SAVED, **(changes or {})}), "job.yaml")
        jobs.append(Job(tmp_path, config, options, before, list(overrides)))
        return jobs[-1]

    yield run
    for job in jobs:
        pids = [*job.ranks().values(), job.process.pid] if job.process.poll() is None else []
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        job.process.wait()


def newest(out: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-[0-9]*")), default=0)


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGUSR1, "launcher"),
        (signal.SIGTERM, "launcher"),
        # SLURM signals every process of a step, and the launcher forwards what it gets.
        (signal.SIGUSR1, "all"),
        (signal.SIGTERM, "all"),
        (signal.SIGUSR1, "one rank"),
    ],
)
def test_a_signal_saves_once_and_the_launcher_ends_last(
    start: Any, last_step: Any, run_record: Any, tmp_path: Path, number: int, to: str, record_property: Any
) -> None:
    out = tmp_path / "out"
    # A checkpoint that takes longer than torch's 30 s would make this test slow; 3 s show who waits for whom.
    job = start(
        [], before=SLOW_STEPS + SLOW_SAVES.replace("SECONDS", "3"), overrides=["training_args.save_steps=100000"]
    )
    job.wait_for(lambda: last_step(out) >= 3)
    ranks = job.ranks()
    assert sorted(ranks) == [0, 1]
    targets = {"launcher": [job.process.pid], "all": [*ranks.values(), job.process.pid], "one rank": [ranks[1]]}[to]
    began = time.monotonic()
    for pid in targets:
        os.kill(pid, number)
    time.sleep(0.5)
    if to == "all":
        for pid in targets:
            os.kill(pid, number)
    assert job.wait() == 128 + number, job.output
    record_property("seconds", f"{time.monotonic() - began:.1f}")
    assert not any(is_running(pid) for pid in ranks.values()), "the launcher outlives its ranks"
    assert newest(out) > 0, job.output
    assert run_record(out)["status"] == "interrupted"
    assert f"signal {int(number)} at step" in job.output


def test_a_save_may_take_longer_than_the_thirty_seconds_of_torch(start: Any, last_step: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = SLOW_STEPS + SLOW_SAVES.replace("SECONDS", "40")
    job = start(["--grace", "120"], before=before, overrides=["training_args.save_steps=100000"])
    job.wait_for(lambda: last_step(out) >= 3)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 143, job.output
    assert newest(out) > 0, job.output


def test_a_save_that_takes_longer_than_the_grace_period_is_a_warning_and_the_job_ends_in_time(
    start: Any, last_step: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = SLOW_STEPS + SLOW_SAVES.replace("SECONDS", "9")
    job = start(["--grace", "8"], before=before)
    job.wait_for(lambda: newest(out) == 5)
    job.wait_for(lambda: last_step(out) >= 8)
    assert "the grace period is 8 s: a signal would lose the checkpoint" in job.output
    began = time.monotonic()
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 143, job.output
    assert time.monotonic() - began < 8
    assert newest(out) == 5, "the checkpoint that was being written is incomplete, and is none"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_is_named_and_the_job_comes_back(
    start: Any, last_step: Any, run_record: Any, tmp_path: Path, rank: int, record_property: Any
) -> None:
    out, limit = tmp_path / "out", 4.0
    job = start(["--max-restarts", "1"], {"run_conf.name_hung_after": limit})
    job.wait_for(lambda: newest(out) >= 5)
    frozen = job.ranks()[rank]
    began = time.monotonic()
    os.kill(frozen, signal.SIGSTOP)
    job.wait_for(lambda: "restart 1 of 1" in job.output)
    record_property("seconds until the restart", f"{time.monotonic() - began:.1f}")
    # Named after the limit and ended after twice that time; torch's launcher then gives the frozen process 30 s.
    assert time.monotonic() - began < 2 * limit + 2 * limit + 40
    assert not is_running(frozen)
    host = socket.gethostname()
    assert f"rank {rank} on host {host} hangs: " in job.output
    assert "The job ends: it made no progress for" in job.output
    saved = newest(out)
    job.wait_for(lambda: newest(out) > saved)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 143, job.output
    assert "checkpoint-" in run_record(out)["resumed_from"]


def test_a_frozen_rank_without_restarts_ends_the_job(
    start: Any, last_step: Any, run_record: Any, tmp_path: Path
) -> None:
    out, error = tmp_path / "out", tmp_path / "error.json"
    os.environ["FINETUNING_ERROR_FILE"] = str(error)
    try:
        job = start([], {"run_conf.name_hung_after": 2.0})
    finally:
        del os.environ["FINETUNING_ERROR_FILE"]
    job.wait_for(lambda: newest(out) >= 5)
    os.kill(job.ranks()[1], signal.SIGSTOP)
    assert job.wait() == 203, job.output
    assert "rank 1 on host" in json.loads(error.read_text())["message"]
    record = run_record(out)
    assert record["status"] == "failed" and "hangs" in record["error"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_the_job_comes_back(
    start: Any, last_step: Any, tmp_path: Path, rank: int, record_property: Any
) -> None:
    out = tmp_path / "out"
    job = start(["--max-restarts", "2"])
    job.wait_for(lambda: newest(out) >= 5)
    began = time.monotonic()
    os.kill(job.ranks()[rank], signal.SIGKILL)
    name = f"rank {rank} on host {socket.gethostname()} was killed by signal 9 (SIGKILL)"
    job.wait_for(lambda: f"{name}, often because the machine ran out of memory: restart 1 of 2" in job.output)
    record_property("seconds until the restart", f"{time.monotonic() - began:.1f}")
    saved = newest(out)
    job.wait_for(lambda: newest(out) > saved)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 143, job.output


BUG = """
from finetuning.training.signals import StopOnSignal
def broken(self, args, state, control, **kwargs):
    if state.global_step == 3 and os.environ["RANK"] == "1":
        raise TypeError("a bug")
StopOnSignal.on_step_end = broken
"""


def test_a_bug_is_not_restarted(start: Any, tmp_path: Path) -> None:
    job = start(["--max-restarts", "3"], before=BUG)
    assert job.wait() == 203
    assert "internal error: TypeError: a bug" in job.output
    assert "not restarted: its error would end another attempt the same way" in job.output
    assert "restart 1" not in job.output
