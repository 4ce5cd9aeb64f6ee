"""Real processes for the tests, started without the imports of a fresh interpreter: see `fork_server.py`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS = 400
"""How long a test waits for a process before it fails: generous, for a machine that is busy with other things."""


class Process:
    """A console script that a fork server has started."""

    def __init__(self, fork_server: ForkServer, args: Sequence[str], pid: int, stdout: Path, stderr: Path):
        self._fork_server = fork_server
        self.args = args
        self.pid = pid
        self._stdout = stdout
        self._stderr = stderr
        self.returncode: int | None = None
        """The exit code once `wait` has returned; negative for a signal."""

    @property
    def stdout(self) -> str:
        """What it has written to its standard output."""
        return self._stdout.read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(encoding="utf-8", errors="replace")

    @property
    def output(self) -> str:
        """Both streams."""
        return self.stdout + self.stderr

    @property
    def state(self) -> str:
        """One letter, as `ps` has it: T is stopped, Z has ended."""
        return Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0]

    @property
    def is_running(self) -> bool:
        return self.returncode is None and self.state != "Z"

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = SECONDS) -> int:
        """Wait until it has ended, and return its exit code.

        Raises:
            subprocess.TimeoutExpired: it is still running after `timeout` seconds.
        """
        if self.returncode is None:
            deadline = time.monotonic() + timeout
            while self.is_running:
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(self.args, timeout, self.stdout, self.stderr)
                time.sleep(0.005)
            self.returncode = self._fork_server.reap(self.pid)
        return self.returncode

    def kill(self) -> int:
        """Kill it, and return its exit code."""
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)
        return self.wait()

    def wait_for(self, condition: Callable[[], bool], pause: float = 0.005) -> bool:
        """Wait until a condition holds. False when the process has ended first."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            if not self.is_running:
                return condition()
            assert time.monotonic() < deadline, self.output
            time.sleep(pause)
        return True


class ForkedPopen:
    """A process of a fork server with the methods of `subprocess.Popen` that the engine and `subprocess.run` use.

    Its streams are a file that both were sent to, or are captured.
    """

    def __init__(self, process: Process):
        self._process = process
        self.args, self.pid = process.args, process.pid

    def __enter__(self) -> ForkedPopen:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def poll(self) -> int | None:
        return None if self._process.is_running else self.wait()

    def wait(self, timeout: float = SECONDS) -> int:
        return self._process.wait(timeout)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, input: None = None, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout or SECONDS)
        return self._process.stdout, self._process.stderr


class ForkServer:
    """Starts console scripts in processes of their own, which share the imports of `fork_server.py`.

    Args:
        folder: for the output of the processes
        environ: the environment of the server, which its imports read, and of its processes; that of the test by
            default
    """

    def __init__(self, folder: Path, environ: Mapping[str, str] | None = None):
        self._folder = folder
        self._environ = environ
        self._running: dict[int, Process] = {}
        self._count = 0
        self._parent = subprocess.Popen(
            # The launcher knows the workers of a job by the module in their command line, which they inherit.
            [sys.executable, str(Path(__file__).with_name("fork_server.py")), "finetuning.cli.main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        assert self._parent.stdout.readline() == "ready\n"

    def start(
        self,
        args: Sequence[object],
        environ: Mapping[str, str | None] | None = None,
        before: str = "",
        *,
        program: str = "finetuning",
        cwd: str | os.PathLike[str] | None = None,
        output: Path | None = None,
    ) -> Process:
        """Start a console script.

        Args:
            args: its arguments
            environ: variables to add to the environment; None removes one
            before: code that the new process runs first
            program: a console script, the path of a Python file, or the name of a module as `python -m` takes it
            cwd: its working directory, the current one by default
            output: a file for both streams instead of one of each
        """
        self._count += 1
        streams = [output or self._folder / f"{self._count}.{name}" for name in ("stdout", "stderr")]
        merged = {**(os.environ if self._environ is None else self._environ), **(environ or {})}
        command = [str(arg) for arg in args]
        request = {
            "program": program,
            "args": command,
            "environ": {name: value for name, value in merged.items() if value is not None},
            "cwd": str(cwd or Path.cwd()),
            "before": before,
            "stdout": str(streams[0]),
            "stderr": str(streams[1]),
        }
        for stream in streams:
            stream.touch()
        process = Process(self, [program, *command], self._ask(request), *streams)
        self._running[process.pid] = process
        return process

    def start_all(
        self,
        args: Sequence[object],
        befores: Sequence[str],
        environ: Mapping[str, str | None] | None = None,
        *,
        program: str = "finetuning",
    ) -> list[Process]:
        """Start the processes of one job, as torchrun does; rank N runs `befores[N]` first."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(len(befores)), "LOCAL_WORLD_SIZE": str(len(befores))}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            self.start(
                args, {**(environ or {}), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, before, program=program
            )
            for rank, before in enumerate(befores)
        ]

    def reap(self, pid: int) -> int:
        """Return the exit code of a process that has ended."""
        code = self._ask({"wait": pid})
        del self._running[pid]
        return code

    def popen(self, command: Sequence[object], stdout: Any = None, env: Any = None, **options: Any) -> ForkedPopen:
        """Start `python -m MODULE ...` of the engine as `subprocess.Popen` does. See `ForkedPopen` for the options."""
        executable, flag, module, *args = map(str, command)
        assert (executable, flag) == (sys.executable, "-m"), command
        before = "import os; os.setsid()" if options.get("start_new_session") else ""
        output = Path(stdout.name) if hasattr(stdout, "name") else None
        return ForkedPopen(self.start(args, env, before, program=module, output=output))

    def clear(self) -> None:
        """Kill what a test has left running."""
        for process in list(self._running.values()):
            process.kill()

    def close(self) -> None:
        self._parent.stdin.close()
        self._parent.wait()

    def _ask(self, request: dict[str, Any]) -> int:
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())


def wait_all(processes: Sequence[Process], timeout: float = SECONDS) -> list[int]:
    """Wait for the processes of one job, and return their exit codes. When one fails, the others are killed."""
    deadline = time.monotonic() + timeout
    while any(process.is_running for process in processes):
        failed = [process for process in processes if not process.is_running and process.wait()]
        if failed or time.monotonic() > deadline:
            for process in processes:
                process.kill()
            assert failed, "".join(process.output for process in processes)
        time.sleep(0.005)
    return [process.wait() for process in processes]
