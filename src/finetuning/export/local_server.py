"""Run a model server of another program on this machine for as long as it is needed, and send requests to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from finetuning.errors import ModelError, first_line

_STOP_SECONDS = 30
_HEALTH_SECONDS = 5


@dataclass(frozen=True)
class LocalServer:
    """A server that has started, and answers at `address`."""

    name: str
    address: str

    def post(self, path: str, body: Mapping[str, object], timeout_s: float = 300) -> dict[str, object]:
        """Send a JSON object, and return the JSON object of the answer.

        Raises:
            ModelError: the server refuses the request, is gone, or does not answer in time.
        """
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}{path}", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")[:1000]
            raise ModelError(f"{self.name} answers with error {error.code}: {reason}") from error
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.name} gave no answer: {first_line(error)}") from error


@contextmanager
def run_server(
    command: Callable[[int], Sequence[str]], name: str, served: str, start_seconds: float
) -> Iterator[LocalServer]:
    """Start a server on a free port of this machine, wait until it is ready, and end it with all its processes.

    Args:
        command: returns the words of the command for a port. The server has to have the endpoint /health.
        name: of the program, for messages.
        served: the model, for messages.

    Raises:
        ModelError: the server ends, or is not ready in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = LocalServer(name, f"http://127.0.0.1:{port}")
    with tempfile.TemporaryFile() as log:
        # In a session of its own, so that a signal ends the processes that the server has started as well.
        process = subprocess.Popen(
            command(port), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + start_seconds
            while not _is_ready(server.address):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    reason = f"{_ending(process.poll())}{_reason(log.read().decode(errors='replace'))}"
                    raise ModelError(f"{name} does not serve {served}: {reason}")
                time.sleep(0.2)
            yield server
        finally:
            _stop(process)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=_HEALTH_SECONDS):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _reason(log: str) -> str:
    """Return the line of a server's output that says most about its end: the first error of Python, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["no output"]
    return next((line for line in lines if "Error: " in line), lines[-1])


def _ending(code: int | None) -> str:
    """Return how a server that a signal has ended did so; "" for others, whose output says why."""
    if code is None or code >= 0:
        return ""
    return f"it was ended by {signal.Signals(-code).name}; its last line: "


def _stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_STOP_SECONDS)
    # What the server has left behind, or the server itself.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=_STOP_SECONDS)
