"""Start the processes of a job with accelerate's launcher."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from finetuning.config.validation.suggestions import did_you_mean
from finetuning.config.yaml.document import YamlSection
from finetuning.config.yaml.reader import read_document
from finetuning.errors import EXIT_GUARD, EXIT_INTERNAL, EXIT_USER, ConfigError, MissingPackageError
from finetuning.launch.restarts import retry_rendezvous

PRESETS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
_PRESET_FOLDER = Path(__file__).parent / "presets"
_MODULE = "finetuning.cli.main"
_RESERVED_FLAGS = ("module", "no_python", "training_script", "training_script_args", "help")
"""Flags of `accelerate launch` that select what runs."""
_DOCUMENTED_CODES = (
    0,
    EXIT_USER,
    EXIT_GUARD,
    EXIT_INTERNAL,
    *(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)),
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
        return [*arguments, "--module", _MODULE, *command]


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


def start(launch: Launch, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the processes of a job to their end, and return the exit code of the first one that failed.

    SIGTERM and SIGINT are forwarded; the processes then save a checkpoint.

    Args:
        command: the arguments of `finetuning`.
        environment: variables that are added to the current ones.

    Raises:
        InternalError: the machines did not rendezvous.
    """
    if launch.is_plain:
        return _run_single_process(command, os.environ | dict(environment))
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing.api import SignalException

    os.environ.update(environment)
    # Its only warning is that c10d assigns the node ranks itself.
    logging.getLogger(torch.distributed.run.__name__).setLevel(logging.ERROR)
    try:
        if launch.rendezvous_timeout_s is None:
            return _run_launcher(launch, command)
        return retry_rendezvous(lambda: _run_launcher(launch, command), launch.rendezvous_timeout_s)
    except SignalException as error:
        return 128 + int(error.sigval)


def _run_launcher(launch: Launch, command: Sequence[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(launch.arguments(command)))
    except ChildFailedError as error:
        return exit_code_of(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:
        return exit_code_of(error.returncode)
    except ValueError as error:
        raise ConfigError(f"accelerate rejects this launch: {error}") from error
    return 0


def exit_code_of(code: int) -> int:
    """Return the documented exit code for a process's own: 128 + signal number, or 203 for undocumented codes."""
    code = 128 - code if code < 0 else code
    return code if code in _DOCUMENTED_CODES else EXIT_INTERNAL


def _run_single_process(command: Sequence[str], environment: Mapping[str, str]) -> int:
    process = subprocess.Popen([sys.executable, "-u", "-m", _MODULE, *command], env=environment)

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, forward), signal.SIGINT: signal.getsignal(signal.SIGINT)}
    # A terminal sends SIGINT to the whole process group. A second one from here would make the run stop at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN if sys.stdin.isatty() else forward)
    try:
        return exit_code_of(process.wait())
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
