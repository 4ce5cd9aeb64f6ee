"""What ends a job of two processes: signals to any of its processes, a frozen one, a killed one, a slow save."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launched_job import SAVED, SLOW_STEPS, Job, is_running, newest

SLOW_SAVES = """
import time
from finetuning.trainer import checkpointing
_publish = checkpointing.publish
def slow(*arguments):
    time.sleep(SECONDS)
    return _publish(*arguments)
checkpointing.publish = slow
"""


@pytest.fixture
def start(sft_values: Any, write_config: Any, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """A function that starts a job whose output directory is `tmp_path / "out"`."""
    jobs: list[Job] = []

    def run(options: list[str], changes: Any = None, before: str = SLOW_STEPS, overrides: Any = ()) -> Job:
        config = write_config(sft_values({**SAVED, **(changes or {})}), "job.yaml")
        jobs.append(Job(tmp_path, config, ["--nproc", "2", *options], before, overrides=overrides))
        return jobs[-1]

    yield run
    for job in jobs:
        job.kill()


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
