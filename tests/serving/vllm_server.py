"""A vLLM server on the CPU for the tests: start it with the engine's own command, ask it, stop it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finetuning

CPU_FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
START_SECONDS = 300


@dataclass(frozen=True)
class Answer:
    """An answer as token ids, without the token that ended it."""

    prompt_ids: list[int]
    ids: list[int]
    has_stopped: bool
    """Whether it ended with a stop token; else at the maximum length."""


@dataclass(frozen=True)
class Server:
    """A vLLM that answers."""

    address: str
    process: subprocess.Popen[bytes]

    def processes(self) -> dict[int, str]:
        """The processes of the server that are still there, its own included: their ids and names.

        All have its session: it was started as the leader of one.
        """
        names = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
                state, _, _, session = rest.split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    names[int(folder.name)] = name
        return names


@contextmanager
def serve(vllm: str, command: Sequence[str], log: Path) -> Iterator[str]:
    """Run the command with the program `vllm` and flags for the CPU, and yield the server's address."""
    with run([vllm, *command[1:]], log) as server:
        yield server.address


@contextmanager
def run(words: Sequence[str], log: Path) -> Iterator[Server]:
    """Run a command that starts vLLM, with flags for the CPU at its end, and yield the server when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*words, *CPU_FLAGS, "--port", str(port)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ENVIRONMENT
    if not Path(words[0]).name.startswith("vllm"):
        environment["PYTHONPATH"] = str(Path(finetuning.__file__).parents[1])
    with log.open("w") as stream:
        process = subprocess.Popen(
            words, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, address, log)
        yield Server(address, process)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"vLLM ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"vLLM did not start in {START_SECONDS} s:\n{log.read_text()[-4000:]}")


def ask(address: str, model: str, messages: list[dict[str, str]], max_tokens: int) -> Answer:
    """Return the greedy answer of the server's chat API."""
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens, "return_token_ids": True}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            content: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error.code}: {error.read().decode()[:2000]}") from None
    (choice,) = content["choices"]
    has_stopped = choice["finish_reason"] == "stop"
    ids = choice["token_ids"][:-1] if has_stopped else choice["token_ids"]
    return Answer(content["prompt_token_ids"], ids, has_stopped)
