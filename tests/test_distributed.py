"""The launcher's environment, however it launched; what a process says while it waits."""

from __future__ import annotations

import ast
import fcntl
import functools
import threading
import time
from pathlib import Path

import pytest

from finetuning.distributed import (
    ProcessTopology,
    announce_wait,
    connecting_processes,
    find_launch_mistake,
    read_topology,
    set_torchrun_variables,
)
from finetuning.errors import CommunicationError, ConfigError


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ProcessTopology()),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, ProcessTopology(3, 1, 8)),
        ({"RANK": "", "WORLD_SIZE": ""}, ProcessTopology()),
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}, ProcessTopology()),
        (
            {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"},
            ProcessTopology(2, 0, 4),
        ),
        (
            {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"},
            ProcessTopology(1, 1, 2),
        ),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, ProcessTopology(1, 0, 2)),
        ({"ACCELERATE_USE_FSDP": "true"}, ProcessTopology(sharded_by="fsdp")),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, ProcessTopology(sharded_by="deepspeed")),
        ({"ACCELERATE_USE_FSDP": "false"}, ProcessTopology()),
    ],
)
def test_topology_of(environ: dict[str, str], expected: ProcessTopology) -> None:
    topology = read_topology(environ)
    assert topology == expected
    assert topology.is_main == (expected.rank == 0)
    assert topology.is_distributed == (expected.world_size > 1)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "two"}, "environment variable WORLD_SIZE='two' is not a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "rank -1 of 2"),
    ],
)
def test_an_environment_that_cannot_be(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_topology(environ)


MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environ", "missing"),
    [
        ({}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"MASTER_ADDR": "a"}, "process 0: MASTER_PORT is not set"),
        ({"MASTER_PORT": "1"}, "process 0: MASTER_ADDR is not set"),
    ],
)
def test_what_mpirun_and_srun_do_not_set_is_named(environ: dict[str, str], missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        set_torchrun_variables(read_topology(MPIRUN), MPIRUN | environ)
    with pytest.raises(ConfigError, match="2 processes, but not which one this is: RANK is unset"):
        set_torchrun_variables(read_topology({"WORLD_SIZE": "2"}), {"WORLD_SIZE": "2"})


def test_torch_gets_the_ranks_of_mpirun_and_srun() -> None:
    environ = {"MASTER_ADDR": "a", "MASTER_PORT": "1"} | MPIRUN
    set_torchrun_variables(read_topology(MPIRUN), environ)
    assert {name: environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
    }
    assert read_topology(environ) == read_topology(MPIRUN)


def test_a_launcher_that_starts_fewer_processes_than_it_was_asked_for_is_reported() -> None:
    assert "starts a single process" in str(find_launch_mistake({"ACCELERATE_USE_CPU": "True"}))
    assert find_launch_mistake({"ACCELERATE_USE_CPU": "True", "WORLD_SIZE": "2"}) is None
    assert find_launch_mistake({"ACCELERATE_USE_CPU": "False"}) is None
    assert find_launch_mistake({}) is None


def test_the_error_of_processes_that_cannot_connect_names_the_variable() -> None:
    message = r"cannot connect: .*127\.0\.1\.1.*set GLOO_SOCKET_IFNAME"
    with pytest.raises(CommunicationError, match=message), connecting_processes():
        raise RuntimeError("Gloo connectFullMesh failed with [127.0.1.1]:1234 Connection refused")
    for message in ("CUDA error: device-side assert", "out of memory"):
        with pytest.raises(RuntimeError, match=message), connecting_processes():
            raise RuntimeError(message)


def test_a_long_wait_says_what_it_waits_for(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.distributed.WAIT_AGAIN_S", 0.05)
    with announce_wait("a lock", after_s=0.05):
        time.sleep(0.4)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) >= 2
    assert all(message.startswith("waiting for a lock, for 0 s so far") for message in messages)
    time.sleep(0.2)
    assert len(caplog.records) == len(messages)


def test_a_short_wait_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with announce_wait("a lock", after_s=0.2):
        pass
    time.sleep(0.3)
    assert not caplog.records


def test_a_process_that_waits_for_cached_rows_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetuning.data import cache

    monkeypatch.setattr(cache, "announce_wait", functools.partial(announce_wait, after_s=0.05))
    path = tmp_path / "entry.lock"
    with path.open("a") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        threading.Timer(0.3, lambda: fcntl.flock(holder, fcntl.LOCK_UN)).start()
        with cache._locked(path) as acquired:
            assert acquired
    assert any("another process that prepares the same rows" in record.getMessage() for record in caplog.records)


SOURCES = Path(__file__).parents[1] / "src" / "finetuning"
BLOCKING = {
    "wait_for_everyone", "broadcast_object_list", "gather_object", "barrier", "flock", "join", "wait",
    "snapshot_download", "hf_hub_download", "load_dataset",
}  # fmt: skip
EXPECTED_WAITS = {
    "launch/processes.py": "the job itself",
    "selftest/trials.py": "a trial, which is printed when it starts",
    "data/worker_pool.py": "worker processes that have ended, or are about to",
    "tracking/mlflow/tracker.py": "a process that was killed",
}


def unannounced_waits(source: str) -> list[str]:
    """Calls that block without a time limit, outside of a `with announce_wait(...)` block."""
    matches: list[str] = []

    def visit(node: ast.AST, announced: bool) -> None:
        if isinstance(node, ast.With):
            announced = announced or "announce_wait" in "".join(ast.unparse(item) for item in node.items)
        if isinstance(node, ast.Call) and not announced:
            name = ast.unparse(node.func).rpartition(".")[2]
            text = ast.unparse(node)
            if name in ("join", "wait"):
                # Of threads, processes and events: those of texts and paths have an argument.
                if not node.args and not node.keywords:
                    matches.append(text)
            elif name in BLOCKING and "LOCK_NB" not in text and "LOCK_UN" not in text:
                matches.append(text)
        for child in ast.iter_child_nodes(node):
            visit(child, announced)

    visit(ast.parse(source), False)
    return matches


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda path: path.relative_to(SOURCES).as_posix())
def test_every_wait_without_a_limit_is_announced(path: Path) -> None:
    if path.relative_to(SOURCES).as_posix() not in EXPECTED_WAITS:
        assert unannounced_waits(path.read_text(encoding="utf-8")) == []


def test_an_unannounced_wait_is_found() -> None:
    assert unannounced_waits("def f(self):\n    self.accelerator.wait_for_everyone()") != []
    assert unannounced_waits("hub.snapshot_download(name)") == ["hub.snapshot_download(name)"]
    assert unannounced_waits("fcntl.flock(f, fcntl.LOCK_EX)\nt.join()") == ["fcntl.flock(f, fcntl.LOCK_EX)", "t.join()"]
    assert unannounced_waits("with announce_wait('x'):\n    t.join()\n','.join(y)") == []
