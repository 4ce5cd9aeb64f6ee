"""Run a job on a Ray cluster: each worker of Ray Train is a machine of the job, on which `finetuning launch` runs.

Ray Train places the workers, and notices when one is lost. Ranks, sharding, signals and restarts are those of any
launch.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType

from finetuning.distributed import announce_wait
from finetuning.errors import EXIT_INTERNAL, LOST_CONNECTION, ConfigError, MissingPackageError, first_line
from finetuning.launch.processes import exit_code_of
from finetuning.launch.restarts import JobEnd
from finetuning.launch.signals import MODULE, processes_of_job

_POLL_S = 0.5
_CAUSE_FIRST_S = 5.0
"""How long a machine that lost its connection waits with its report: that of the lost one comes first."""
_RAY_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What Ray Train sets for one process on each worker."""


@dataclass(frozen=True)
class RayJob:
    """A job for a Ray cluster."""

    machines: int
    processes: int
    """Per machine."""
    options: tuple[str, ...]
    """Options of `finetuning launch` for each machine."""
    command: tuple[str, ...]
    """The subcommand and its arguments."""
    uses_gpus: bool = False
    """Whether each process gets a GPU."""
    folder: Path = field(default_factory=Path.cwd)
    """The working directory on each machine, which relative paths refer to."""

    def arguments(self, rank: int, address: str) -> list[str]:
        """Return the arguments of `finetuning` on a machine; `address` is HOST:PORT of the first one."""
        machines = ["--nnodes", str(self.machines), "--node-rank", str(rank), "--main-address", address]
        return ["launch", "--nproc", str(self.processes), *machines, *self.options, *self.command]


class MachineFailed(Exception):
    """The launcher of a machine ended with another exit code than 0; `report` is the JSON of its error, or empty."""

    def __init__(self, rank: int, exit_code: int, report: str):
        super().__init__(rank, exit_code, report)
        self.rank, self.exit_code, self.report = rank, exit_code, report

    def __str__(self) -> str:
        return f"machine {self.rank} of the job ended with exit code {self.exit_code}"

    @property
    def is_consequence(self) -> bool:
        """Whether another machine's end is the reason."""
        return bool(self.report) and json.loads(self.report)["class"] == LOST_CONNECTION


class ReceivedSignal:
    """An actor that holds the number of the first signal that the job got; 0 before."""

    def __init__(self) -> None:
        self._number = 0

    def set(self, number: int) -> None:
        self._number = self._number or number

    def get(self) -> int:
        return self._number


def connect() -> ModuleType:
    """Connect to the Ray cluster of $RAY_ADDRESS or of this machine, and return the module `ray`.

    Raises:
        MissingPackageError: Ray Train is not installed.
        ConfigError: there is no cluster.
    """
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.train.torch")
    except ImportError as error:
        raise MissingPackageError(
            f"--ray requires Ray Train: {first_line(error)}", hint="Install it: pip install 'finetuning[ray]'."
        ) from error
    try:
        with announce_wait("the Ray cluster"):
            ray.init(address=os.environ.get("RAY_ADDRESS") or "auto", ignore_reinit_error=True)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster: {first_line(error)}",
            hint="Start one with ray start --head, run this with ray job submit, or set RAY_ADDRESS.",
        ) from error
    return ray


def gpus_of_a_machine(ray: ModuleType) -> int:
    """Return the GPUs of the machine of the cluster that has most."""
    return max((int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)


def start_on_ray(ray: ModuleType, job: RayJob, error_file: Path) -> JobEnd:
    """Run a job once on the cluster, and return how it ended.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP are passed on to the launchers of all machines.

    Args:
        error_file: where the error of the machine that failed is written, as its processes report it.
    """
    torch_trainer = importlib.import_module("ray.train.torch")
    config = importlib.import_module("ray.train")
    name = f"finetuning signal {uuid.uuid4()}"
    # The reference keeps the actor alive.
    received = ray.remote(num_cpus=0)(ReceivedSignal).options(name=name).remote()
    resources = {"GPU": job.processes} if job.uses_gpus else {"CPU": 1}
    with tempfile.TemporaryDirectory(prefix="finetuning-ray-") as folder:
        trainer = torch_trainer.TorchTrainer(
            lambda: run_machine(job, name),
            scaling_config=config.ScalingConfig(
                num_workers=job.machines,
                use_gpu=job.uses_gpus,
                resources_per_worker=resources,
                placement_strategy="SPREAD",
            ),
            # A group of Ray Train's own, which only reports the first machine's address.
            torch_config=torch_trainer.TorchConfig(backend="gloo"),
            run_config=config.RunConfig(storage_path=folder, failure_config=config.FailureConfig(max_failures=0)),
        )
        failures: list[Exception] = []

        def run_trainer() -> None:
            try:
                trainer.fit()
            except config.TrainingFailedError as error:
                failures.append(error)

        with _handle_signals(lambda number: received.set.remote(number)):
            # Not in this thread, where Ray Train would handle SIGINT itself and kill the workers.
            thread = threading.Thread(target=run_trainer, name="ray train", daemon=True)
            thread.start()
            while thread.is_alive():
                thread.join(_POLL_S)
    return _job_end(failures[0], error_file) if failures else JobEnd(0)


def _job_end(error: Exception, error_file: Path) -> JobEnd:
    causes: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    ends = [end for end in map(_as_machine_failed, causes.values()) if end is not None]
    lost = [rank for rank, cause in causes.items() if _as_machine_failed(cause) is None]
    if lost:
        return JobEnd(EXIT_INTERNAL, f"machine {lost[0]} of the job was lost: {first_line(causes[lost[0]])}")
    if not ends:
        return JobEnd(EXIT_INTERNAL, f"Ray Train ended the job: {first_line(error)}")
    end = min(ends, key=lambda end: (end.is_consequence, end.rank))
    if end.report:
        error_file.write_text(end.report, encoding="utf-8")
    return JobEnd(end.exit_code)


def _as_machine_failed(error: object) -> MachineFailed | None:
    """Return the error of `run_machine` that Ray wraps, in attributes; None if the worker itself was lost."""
    if isinstance(error, MachineFailed) or not isinstance(error, BaseException):
        return error if isinstance(error, MachineFailed) else None
    inner = map(_as_machine_failed, (*vars(error).values(), error.__cause__))
    return next((failure for failure in inner if failure is not None), None)


@contextmanager
def _handle_signals(send: Callable[[int], object]) -> Iterator[None]:
    """Call `send` with the number of each signal in the block, in a thread: Ray's client is not reentrant."""

    def handle(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=send, args=(number,), daemon=True).start()

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_machine(job: RayJob, signal_actor: str) -> None:
    """Run the launcher of one machine: the function of a worker of Ray Train.

    Args:
        signal_actor: the name of the `ReceivedSignal` of the job.

    Raises:
        MachineFailed: it ended with another exit code than 0.
    """
    train, ray = importlib.import_module("ray.train"), importlib.import_module("ray")
    collective = importlib.import_module("ray.train.collective")
    rank, received = train.get_context().get_world_rank(), ray.get_actor(signal_actor)
    address = collective.broadcast_from_rank_zero(f"{ray.util.get_node_ip_address()}:{_free_port()}")
    environment = {name: value for name, value in os.environ.items() if name not in _RAY_VARIABLES}
    with tempfile.TemporaryDirectory(prefix="finetuning-launch-") as folder:
        error_file = Path(folder, "error.json")
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", __name__, *job.arguments(rank, address)],
            env=environment | {"FINETUNING_ERROR_FILE": str(error_file)},
            cwd=job.folder,
        )
        is_signaled = False
        while process.poll() is None:
            time.sleep(_POLL_S)
            number = 0 if is_signaled else ray.get(received.get.remote())
            if number:
                process.send_signal(number)
                is_signaled = True
        report = error_file.read_text(encoding="utf-8") if error_file.exists() else ""
    if process.returncode:
        failed = MachineFailed(rank, exit_code_of(process.returncode), report)
        if failed.is_consequence:
            time.sleep(_CAUSE_FIRST_S)
        raise failed


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


def _end_with(parent: int) -> None:
    """Kill the processes of the job and this one when the parent is gone: Ray kills a worker, not what it started."""
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    for pid in processes_of_job():
        os.kill(pid, signal.SIGKILL)
    os._exit(EXIT_INTERNAL)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
