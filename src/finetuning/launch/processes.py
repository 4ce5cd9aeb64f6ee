"""The processes of a job, started by accelerate's own launcher."""

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
from typing import Any

from finetuning.config.validation.suggestions import did_you_mean
from finetuning.config.yaml.reader import read_document
from finetuning.errors import EXIT_GUARD, EXIT_INTERNAL, EXIT_USER, ConfigError, MissingPackageError
from finetuning.launch.restarts import rendezvous_ok

PRESETS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
_MODULE = "finetuning.cli.main"
_FOLDER = Path(__file__).parent / "presets"
_OURS = ("module", "no_python", "training_script", "training_script_args", "help")
_INTERRUPTED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
_TOLD = (0, EXIT_USER, EXIT_GUARD, EXIT_INTERNAL, *_INTERRUPTED)


@dataclass(frozen=True)
class Launch:
    """How many processes run the engine, on how many machines, and what accelerate's launcher is told besides."""

    processes: int
    """Of all machines together."""
    machines: int = 1
    config_file: Path | None = None
    """An accelerate config: a preset or the user's."""
    flags: tuple[str, ...] = ()
    """Flags of `accelerate launch`; they win over the file."""
    meet_within_s: float | None = None
    """How long machines wait for each other, which meet by c10d; None when the flags say how they meet, if they do."""

    @property
    def is_plain(self) -> bool:
        """One process that needs no launcher."""
        return self.processes == 1 and self.machines == 1 and self.config_file is None and not self.flags

    def arguments(self, command: Sequence[str]) -> list[str]:
        """What follows `accelerate launch`; `command` is what follows `finetuning`."""
        given = ["--config_file", str(self.config_file)] if self.config_file else _without_config(self.flags)
        given += ["--num_processes", str(self.processes), "--num_machines", str(self.machines), *self.flags]
        return [*given, "--module", _MODULE, *command]


def _without_config(flags: Iterable[str]) -> list[str]:
    """What keeps a config in the user's home, made for other work, from being read, and accelerate from guessing."""
    missing = {"--mixed_precision": "no", "--dynamo_backend": "no"}
    given = [item for name, value in missing.items() if name not in flags for item in (name, value)]
    return ["--config_file", str(_FOLDER / "ddp.yaml"), *given]


def preset_file(name: str) -> Path:
    """The accelerate config of a preset.

    Raises:
        MissingPackageError: it needs DeepSpeed, which is not installed.
    """
    path = _FOLDER / f"{name}.yaml"
    require_deepspeed(path)
    return path


def require_deepspeed(config_file: Path) -> dict[str, Any]:
    """The values of an accelerate config.

    Raises:
        MissingPackageError: it needs DeepSpeed, which is not installed.
        ConfigError: it cannot be read.
    """
    values = read_document(config_file).values
    wants = str(values.get("distributed_type", "")).upper() == "DEEPSPEED"
    if wants and importlib.util.find_spec("deepspeed") is None:
        raise MissingPackageError(
            f"{config_file.name} needs DeepSpeed, which is not installed",
            hint="Install it: pip install 'finetuning[deepspeed]'. The preset fsdp2 shares out weights without it.",
        )
    return values


def to_flags(values: Mapping[str, Any], where: str = "accelerate_launch_args") -> list[str]:
    """Flags of `accelerate launch` for a mapping of their long names; true stands for a flag without a value.

    Raises:
        ConfigError: a name that the installed accelerate does not know, or a value of the wrong kind.
    """
    from accelerate.commands.launch import launch_command_parser

    known = {
        option[2:]: action.nargs == 0
        for action in launch_command_parser()._actions
        for option in action.option_strings
        if option.startswith("--") and "-" not in option[2:] and option[2:] not in _OURS
    }
    flags: list[str] = []
    for name, value in values.items():
        if name not in known:
            raise ConfigError(
                f"{where}: {name} is no long flag of accelerate launch", hint=did_you_mean(name, sorted(known))
            )
        if known[name]:
            if not isinstance(value, bool):
                raise ConfigError(f"{where}: {name} is true or false, not {value!r}")
            flags += [f"--{name}"] * value
        elif isinstance(value, dict):
            raise ConfigError(f"{where}: {name} is one value, not keys and values")
        elif value is not None:
            for one in value if isinstance(value, list) else [value]:
                flags += [f"--{name}", str(one).lower() if isinstance(one, bool) else str(one)]
    return flags


def visible_gpus() -> int:
    """Number of GPUs that a process of ours would see."""
    import torch

    return torch.cuda.device_count()


def start(launch: Launch, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """The exit code of the job, once all processes have ended: that of the first process that failed.

    SIGTERM and SIGINT are passed on; the processes then save a checkpoint. `environment` is added to our own.

    Raises:
        InternalError: its machines did not meet.
    """
    if launch.is_plain:
        return _start_one(command, os.environ | dict(environment))
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing.api import SignalException

    os.environ.update(environment)
    # Its only warning is that c10d gives out the ranks itself.
    logging.getLogger(torch.distributed.run.__name__).setLevel(logging.ERROR)
    try:
        if launch.meet_within_s is None:
            return _start_all(launch, command)
        return rendezvous_ok(lambda: _start_all(launch, command), launch.meet_within_s)
    except SignalException as error:
        return 128 + int(error.sigval)


def _start_all(launch: Launch, command: Sequence[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(launch.arguments(command)))
    except ChildFailedError as error:
        return exit_code_of(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:
        return exit_code_of(error.returncode)
    except ValueError as error:
        raise ConfigError(f"accelerate refuses this launch: {error}") from error
    return 0


def exit_code_of(code: int) -> int:
    """The exit code that a process's stands for: one of those that are documented, or 203."""
    code = 128 - code if code < 0 else code
    return code if code in _TOLD else EXIT_INTERNAL


def _start_one(command: Sequence[str], environment: Mapping[str, str]) -> int:
    process = subprocess.Popen([sys.executable, "-u", "-m", _MODULE, *command], env=environment)

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    # A terminal sends its interrupt to the process, too, which would take a second one as an order to stop at once.
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on), signal.SIGINT: signal.getsignal(signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.SIG_IGN if sys.stdin.isatty() else pass_on)
    try:
        return exit_code_of(process.wait())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
