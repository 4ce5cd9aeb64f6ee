"""`finetuning runs`: the runs it lists, and the state of each."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetuning.errors import ConfigError
from finetuning.report.run_list import list_runs

HOLD = "import fcntl, sys; lock = open(sys.argv[1], 'a'); fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True);"


def write_run(
    folder: Path, status: str, *, pid: int = 0, host: str | None = None, started: str = "", **values: Any
) -> Path:
    folder.mkdir(parents=True)
    job = {"pid": pid, "host": host or platform.node(), "started": started or "2026-01-01T00:00:00Z"}
    record = {"status": status, "method": "sft", "model": {"name": "/m/tiny"}, "jobs": [job], **values}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def holder() -> Iterator[Callable[[Path], int]]:
    """Starts a process that holds an output directory, and gives its id."""
    started = []

    def hold(folder: Path) -> int:
        command = [sys.executable, "-c", HOLD + "sys.stdin.read()", str(folder / ".finetuning.lock")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        started.append(process)
        return process.pid

    yield hold
    for process in started:
        process.communicate()


def test_states(tmp_path: Path, holder: Callable[[Path], int]) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    held = write_run(tmp_path / "held", "running")
    record = json.loads((held / "run.json").read_text())
    record["jobs"][0]["pid"] = holder(held)
    (held / "run.json").write_text(json.dumps(record))
    write_run(tmp_path / "gone", "running", pid=int(ended.stdout))
    write_run(tmp_path / "reused", "running", pid=os.getpid())
    write_run(tmp_path / "far", "running", host="elsewhere")
    for status in ("completed", "interrupted", "failed", "stopped by a guard"):
        write_run(tmp_path / status.split()[0], status)
    assert {Path(state.folder).name: state.state for state in list_runs(tmp_path)} == {
        "held": "running",
        "gone": "dead",
        "reused": "dead",
        "far": "on elsewhere",
        "completed": "completed",
        "interrupted": "interrupted",
        "failed": "failed",
        "stopped": "stopped",
    }


def test_numbers_and_order(tmp_path: Path) -> None:
    old = write_run(tmp_path / "a" / "old", "completed", started="2026-01-01T00:00:00Z", plan={"steps": {"total": 9}})
    new = write_run(tmp_path / "new", "completed", started="2026-02-01T00:00:00Z")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    write_run(old / "checkpoint-5" / "x", "completed")
    lines = [{"step": step, "loss": 10 - step, "tokens_per_s": 5.0} for step in range(5000)]
    lines += [{"step": 5000, "eval_loss": 0.5, "loss": None}]
    (old / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    states = list_runs(tmp_path)
    assert [state.folder for state in states] == [str(new), str(old)]
    state = states[1]
    assert (state.step, state.steps, state.loss, state.validation_loss) == (5000, 9, 10 - 4999, 0.5)
    assert states[0].loss is None


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        list_runs(tmp_path / "none")


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_the_table_fits_the_terminal(columns: int, tmp_path: Path, run_cli: Callable) -> None:
    write_run(tmp_path / "one", "completed", telemetry={"session": {"goodput": 0.5}})
    result = run_cli(["runs", str(tmp_path)], env={"COLUMNS": str(columns)})
    assert result.returncode == 0, result.stderr
    assert "one" in result.stdout and "completed" in result.stdout and "50%" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= columns


def test_json_output(tmp_path: Path, run_cli: Callable) -> None:
    write_run(tmp_path / "one", "failed")
    result = run_cli(["runs", "--json", str(tmp_path)])
    [state] = json.loads(result.stdout)
    assert state["state"] == "failed" and state["model"] == "/m/tiny"
    (tmp_path / "one" / "run.json").unlink()
    assert run_cli(["runs", str(tmp_path)]).stdout == f"no runs in {tmp_path}\n"
