"""What `finetuning launch --ray` decides without Ray; `tests/cluster/test_ray.py` runs it on a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetuning.cli.launch import build_parser, main
from finetuning.launch.on_ray import MachineFailed, RayJob, _job_end


def test_each_machine_runs_the_launcher() -> None:
    job = RayJob(2, 8, ("--preset", "fsdp2"), ("sft", "a.yaml", "run_conf.model=b"))
    name, *arguments = job.arguments(1, "10.0.0.1:1234")
    options = build_parser().parse_args(arguments)
    assert (name, options.nnodes, options.node_rank, options.nproc) == ("launch", 2, 1, "8")
    assert (options.main_address, options.preset) == ("10.0.0.1:1234", "fsdp2")
    assert options.command == ["sft", "a.yaml", "run_conf.model=b"]


def test_a_dry_run_prints_the_command_of_a_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ray", "--dry-run", "--nnodes", "2", "--nproc", "4", "--grace", "60", "sft", "a.yaml"]) == 0
    command = "launch --nproc 4 --nnodes 2 --node-rank 0 --main-address HOST:PORT --grace 60 sft a.yaml"
    assert capsys.readouterr().out.strip() == f"finetuning {command}"


def test_ray_chooses_the_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ray", "--node-rank", "1", "sft", "a.yaml"]) == 1
    assert "--ray chooses the machines itself" in capsys.readouterr().err


class WorkersFailed(Exception):
    """Has the attribute of Ray Train's `WorkerGroupError`."""

    def __init__(self, worker_failures: dict[int, Exception]):
        super().__init__("Training failed")
        self.worker_failures = worker_failures


def failed(rank: int, code: int, name: str) -> MachineFailed:
    return MachineFailed(rank, code, json.dumps({"class": name}))


def wrapped(error: Exception) -> Exception:
    outer = RuntimeError("as Ray wraps it")
    outer.__cause__ = error
    return outer


def test_the_machine_that_failed_first_counts(tmp_path: Path) -> None:
    report = tmp_path / "error.json"
    errors = {0: failed(0, 203, "LostConnection"), 1: wrapped(failed(1, 3, "GuardStopped"))}
    end = _job_end(WorkersFailed(errors), report)
    assert (end.exit_code, end.killed) == (3, None)
    assert json.loads(report.read_text())["class"] == "GuardStopped"


def test_a_lost_machine_is_named(tmp_path: Path) -> None:
    report = tmp_path / "error.json"
    errors = {0: failed(0, 203, "LostConnection"), 1: RuntimeError("the actor died")}
    end = _job_end(WorkersFailed(errors), report)
    assert (end.exit_code, end.killed) == (203, "machine 1 of the job was lost: the actor died")
    assert _job_end(RuntimeError("no controller"), report).killed == "Ray Train ended the job: no controller"
    assert not report.exists()
