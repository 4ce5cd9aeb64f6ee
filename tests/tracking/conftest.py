"""Real MLflow servers on the loopback, each on a database that was migrated once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Server:
    """A running `mlflow server`. All of its processes are one group, so that a signal reaches the workers, too."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def signal(self, number: int) -> None:
        assert self.process
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()

    def start_again(self) -> None:
        """Start a new server on the same port and database."""
        self.process = _spawn(self.folder, self.port)
        _await_health(self)


def _spawn(folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/files"]
    with (folder / "server.log").open("ab") as log:
        # The processes that run jobs of the server's own would import MLflow several times.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def _await_health(server: Server) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert server.process and server.process.poll() is None, (server.folder / "server.log").read_text()
        try:
            with urllib.request.urlopen(f"{server.uri}/health", timeout=20):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError((server.folder / "server.log").read_text())


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables in it."""
    folder = tmp_path_factory.mktemp("mlflow-database")
    code = (
        f"from mlflow.tracking import MlflowClient; MlflowClient('sqlite:///{folder}/mlflow.db').search_experiments()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    return folder / "mlflow.db"


def _prepare(folder: Path, database: Path) -> Server:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(database, folder / "mlflow.db")
    return Server(folder, free_port())


def _launch(folder: Path, database: Path) -> Server:
    server = _prepare(folder, database)
    try:
        server.start_again()
    except BaseException:
        server.stop()
        raise
    return server


@pytest.fixture(scope="session")
def mlflow_server(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that the tests of a worker share; nobody harms it."""
    server = _launch(tmp_path_factory.mktemp("mlflow-server"), migrated_database)
    yield server
    server.stop()


@pytest.fixture
def launch_server(migrated_database: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """A function that makes servers that a test may kill or freeze; `running=False`: one that is started later."""
    servers: list[Server] = []

    def launch(*, running: bool = True) -> Server:
        make = _launch if running else _prepare
        servers.append(make(tmp_path / f"server-{len(servers)}", migrated_database))
        return servers[-1]

    yield launch
    for server in servers:
        server.stop()


@pytest.fixture
def closed_port() -> int:
    """A port that nobody listens on."""
    return free_port()


@pytest.fixture
def black_hole() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield listener.getsockname()[1]


JobStarter = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_job() -> Iterator[JobStarter]:
    """Starts `job.py` as a process of its own: `start_job(uri, output, "--steps", "20")`."""
    jobs: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("job.py")), *map(str, arguments)]
        jobs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()
        job.communicate()


@pytest.fixture
def run_job(start_job: JobStarter) -> Callable[..., dict[str, Any]]:
    """The report of a job that was run to its end, `stderr` and `code` added."""

    def run(*arguments: object) -> dict[str, Any]:
        return finished(start_job(*arguments))

    return run


def finished(job: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = job.communicate(timeout=400)
    report = json.loads(output) if output else {}
    return report | {"stderr": errors, "code": job.returncode}


@pytest.fixture
def finish_job() -> Callable[[subprocess.Popen[str]], dict[str, Any]]:
    """The report of a job that was started."""
    return finished


@pytest.fixture
def paused_job(start_job: JobStarter) -> Callable[..., tuple[subprocess.Popen[str], Path]]:
    """A job that waits in the middle, and the file to remove so that it goes on."""

    def start(uri: str, output: Path, *arguments: object) -> tuple[subprocess.Popen[str], Path]:
        job = start_job(uri, output, "--steps", 40, "--pause-at", 20, *arguments)
        mark = output / "paused"
        await_true(mark.exists)
        return job, mark

    return start


def await_true(condition: Callable[[], bool], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Waits until a condition holds; fails after some minutes."""
    return await_true


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """An MlflowClient for an address."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def make(uri: str) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(uri)

    return make
