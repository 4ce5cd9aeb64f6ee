"""Real processes for the faults: started in a moment, killed at any."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SECONDS = 120


@dataclass(frozen=True)
class Process:
    """A run that a nursery has started."""

    fork_server: ForkServer
    pid: int
    output: Path

    @property
    def output(self) -> str:
        """What it has written to its standard streams."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    @property
    def state(self) -> str:
        """One letter, as `ps` has it: T is stopped, Z has ended."""
        return Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0]

    @property
    def is_running(self) -> bool:
        return self.state != "Z"

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, once it has ended; negative for a signal."""
        return self.fork_server.wait(self.pid)

    def kill(self) -> int:
        self.send(signal.SIGKILL)
        return self.wait()

    def wait_for(self, there: Callable[[], bool], pause: float = 0.005) -> bool:
        """Waits until something is there. False when the process ended first."""
        deadline = time.monotonic() + SECONDS
        while not there():
            if not self.is_running:
                return there()
            assert time.monotonic() < deadline, self.output
            time.sleep(pause)
        return True


class ForkServer:
    """Starts runs in processes of their own, which share the imports of `fork_server.py`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._running: dict[int, Process] = {}
        self._count = 0
        self._parent = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert self._parent.stdout.readline() == "ready\n"

    def start(self, args: Sequence[object], environ: Mapping[str, str] | None = None, before: str = "") -> Process:
        """`finetuning` with these arguments; `before` is code that the new process runs first."""
        self._count += 1
        output = self._folder / f"{self._count}.txt"
        request = {"args": [str(arg) for arg in args], "environ": dict(environ or {}), "before": before}
        process = Process(self, self._ask(request | {"output": str(output)}), output)
        self._running[process.pid] = process
        return process

    def start_all(self, args: Sequence[object], befores: Sequence[str]) -> list[Process]:
        """The processes of one job, as torchrun starts them; rank N runs `befores[N]` first."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(len(befores)), "LOCAL_WORLD_SIZE": str(len(befores))}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            self.start(args, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, before)
            for rank, before in enumerate(befores)
        ]

    def wait(self, pid: int) -> int:
        code = self._ask({"wait": pid})
        del self._running[pid]
        return code

    def clear(self) -> None:
        """Ends what a test has left running."""
        for process in list(self._running.values()):
            process.kill()

    def close(self) -> None:
        self._parent.stdin.close()
        self._parent.wait()

    def _ask(self, request: dict[str, Any]) -> int:
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())


@pytest.fixture(scope="session")
def shared_fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    fork_server = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield fork_server
    fork_server.close()


@pytest.fixture
def fork_server(shared_fork_server: ForkServer) -> Iterator[ForkServer]:
    """Starts runs as processes that are gone when the test is."""
    yield shared_fork_server
    shared_fork_server.clear()


@pytest.fixture(scope="session")
def losses_by_step() -> Callable[[Path], dict[int, set[float]]]:
    """A function that reads all losses that were ever logged in an output directory, by step."""

    def read(output_dir: Path) -> dict[int, set[float]]:
        result: dict[int, set[float]] = {}
        for line in (output_dir / "training_logs.jsonl").read_text(encoding="utf-8").splitlines():
            data = json.loads(line)["data"]
            result.setdefault(data["step"], set()).add(data["value"])
        return result

    return read
