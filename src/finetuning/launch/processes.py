"""Start the processes of a job with accelerate's launcher."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.config.validation.suggestions import did_you_mean
from finetuning.config.yaml.document import YamlSection
from finetuning.config.yaml.reader import read_document
from finetuning.distributed import read_grace
from finetuning.errors import EXIT_GUARD, EXIT_INTERNAL, EXIT_USER, ConfigError, MissingPackageError
from finetuning.launch.restarts import JobEnd, retry_rendezvous
from finetuning.launch.signals import MODULE, forward_signals

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

PRESETS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
_PRESET_FOLDER = Path(__file__).parent / "presets"
_RESERVED_FLAGS = ("module", "no_python", "training_script", "training_script_args", "help")
"""Flags of `accelerate launch` that select what runs."""
_AGENT_KILLS_AFTER_S = 20
"""Less than the time that torch's agent leaves processes to end after SIGTERM, 30 s."""
_DOCUMENTED_CODES = (
    0,
    EXIT_USER,
    EXIT_GUARD,
    EXIT_INTERNAL,
    *(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)),
)


@dataclass(frozen=True)
class Launch:
    """The number of processes and machines, and the options of accelerate's launcher."""

    processes: int
    """Total over all machines."""
    machines: int = 1
    config_file: Path | None = None
    """An accelerate config: a preset or the user's."""
    flags: tuple[str, ...] = ()
    """Flags of `accelerate launch`; they override the config file."""
    rendezvous_timeout_s: float | None = None
    """How long the machines of a c10d rendezvous wait for each other; None if the flags set up the rendezvous."""

    @property
    def is_plain(self) -> bool:
        """Whether this is a single process that needs no launcher."""
        return self.processes == 1 and self.machines == 1 and self.config_file is None and not self.flags

    def arguments(self, command: Sequence[str]) -> list[str]:
        """Return the arguments of `accelerate launch` that run `finetuning COMMAND`."""
        arguments = ["--config_file", str(self.config_file)] if self.config_file else _neutral_config(self.flags)
        arguments += ["--num_processes", str(self.processes), "--num_machines", str(self.machines), *self.flags]
        return [*arguments, "--module", MODULE, *command]


def _neutral_config(flags: Iterable[str]) -> list[str]:
    """Return flags that keep accelerate from reading the config in the user's home, and from guessing defaults."""
    defaults = {"--mixed_precision": "no", "--dynamo_backend": "no"}
    missing = [item for name, value in defaults.items() if name not in flags for item in (name, value)]
    return ["--config_file", str(_PRESET_FOLDER / "ddp.yaml"), *missing]


def preset_file(name: str) -> Path:
    """Return the path of a preset's accelerate config.

    Raises:
        MissingPackageError: the preset requires DeepSpeed, which is not installed.
    """
    path = _PRESET_FOLDER / f"{name}.yaml"
    require_deepspeed(path)
    return path


def require_deepspeed(config_file: Path) -> YamlSection:
    """Return the values of an accelerate config, after checking that DeepSpeed is installed if it uses it.

    Raises:
        MissingPackageError: the config requires DeepSpeed, which is not installed.
        ConfigError: the file cannot be read.
    """
    values = read_document(config_file).values
    uses_deepspeed = str(values.get("distributed_type", "")).upper() == "DEEPSPEED"
    if uses_deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise MissingPackageError(
            f"{config_file.name} requires DeepSpeed, which is not installed",
            hint="Install it: pip install 'finetuning[deepspeed]'. The preset fsdp2 shards the model without it.",
        )
    return values


def to_flags(values: Mapping[str, object], where: str = "accelerate_launch_args") -> list[str]:
    """Return flags of `accelerate launch` for a mapping of long flag names; true sets a flag that takes no value.

    Raises:
        ConfigError: the installed accelerate does not have a flag, or a value has the wrong type.
    """
    from accelerate.commands.launch import launch_command_parser

    is_switch = {
        option[2:]: action.nargs == 0
        for action in launch_command_parser()._actions
        for option in action.option_strings
        # accelerate lists each flag with underscores and with hyphens.
        if option.startswith("--") and "-" not in option[2:] and option[2:] not in _RESERVED_FLAGS
    }
    flags: list[str] = []
    for name, value in values.items():
        if name not in is_switch:
            raise ConfigError(
                f"{where}: accelerate launch has no flag --{name}", hint=did_you_mean(name, sorted(is_switch))
            )
        if is_switch[name]:
            if not isinstance(value, bool):
                raise ConfigError(f"{where}: {name} must be true or false, not {value!r}")
            flags += [f"--{name}"] * value
        elif isinstance(value, dict):
            raise ConfigError(f"{where}: {name} must be a single value, not a mapping")
        elif value is not None:
            for item in value if isinstance(value, list) else [value]:
                flags += [f"--{name}", str(item).lower() if isinstance(item, bool) else str(item)]
    return flags


def visible_gpus() -> int:
    """Return the number of GPUs that a process would see."""
    import torch

    return torch.cuda.device_count()


def start(
    launch: Launch, command: Sequence[str], environment: Mapping[str, str], *, grace_s: int | None = None
) -> JobEnd:
    """Run the processes of a job to their end; the exit code is that of the first one that failed.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP are forwarded; the processes then save a checkpoint.

    Args:
        command: the arguments of `finetuning`.
        environment: variables that are added to the current ones.
        grace_s: how many seconds after its signal the scheduler kills the job; None for that of the environment.

    Raises:
        InternalError: the machines did not rendezvous.
    """
    os.environ.update(environment)
    with forward_signals(read_grace() if grace_s is None else grace_s) as forwarder:
        end = _run_processes(launch, command)
        return JobEnd(forwarder.exit_code(end.exit_code), None if forwarder.received else end.killed)


def _run_processes(launch: Launch, command: Sequence[str]) -> JobEnd:
    if launch.is_plain:
        code = subprocess.Popen([sys.executable, "-u", "-m", MODULE, *command]).wait()
        return JobEnd(exit_code_of(code), _describe_killed(0, code))
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing.api import SignalException

    # Its only warning is that c10d assigns the node ranks itself.
    logging.getLogger(torch.distributed.run.__name__).setLevel(logging.ERROR)
    try:
        if launch.rendezvous_timeout_s is None:
            return _run_launcher(launch, command)
        return retry_rendezvous(lambda: _run_launcher(launch, command), launch.rendezvous_timeout_s)
    except SignalException as error:
        return JobEnd(128 + int(error.sigval))


def _run_launcher(launch: Launch, command: Sequence[str]) -> JobEnd:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(launch.arguments(command)))
    except ChildFailedError as error:
        return job_end(error.failures)
    except subprocess.CalledProcessError as error:
        return JobEnd(exit_code_of(error.returncode), _describe_killed(0, error.returncode))
    except ValueError as error:
        raise ConfigError(f"accelerate rejects this launch: {error}") from error
    return JobEnd(0)


def job_end(failures: Mapping[int, ProcessFailure]) -> JobEnd:
    """Return how a job ended from the failures of its processes by rank, at least one.

    When a process is killed, the others lose their connections at the same time. Then torch's agent ends those that
    still run: by SIGTERM, and much later by SIGKILL.
    """
    first = min(failures, key=lambda rank: failures[rank].timestamp)
    killed = [
        rank
        for rank, failure in failures.items()
        if failure.exitcode < 0
        and failure.exitcode != -signal.SIGTERM
        and failure.timestamp - failures[first].timestamp < _AGENT_KILLS_AFTER_S
    ]
    description = _describe_killed(killed[0], failures[killed[0]].exitcode) if killed else None
    return JobEnd(exit_code_of(failures[first].exitcode), description)


def _describe_killed(rank: int, code: int) -> str | None:
    """Return a sentence on a process that a signal killed; None if it ended by itself."""
    if code >= 0 or -code in (signal.SIGTERM, signal.SIGINT):
        return None
    memory = ", often because the machine ran out of memory" if -code == signal.SIGKILL else ""
    return f"rank {rank} on host {socket.gethostname()} was killed by signal {-code} ({_name(-code)}){memory}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"


def exit_code_of(code: int) -> int:
    """Return the documented exit code for a process's own: 128 + signal number, or 203 for undocumented codes."""
    code = 128 - code if code < 0 else code
    return code if code in _DOCUMENTED_CODES else EXIT_INTERNAL
