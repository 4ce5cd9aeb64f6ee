"""`finetuning launch`: the processes of a job, on this machine or on several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import report_for_processes, reported_errors, reset_error_file, run_command
from finetuning.errors import ConfigError

if TYPE_CHECKING:
    from finetuning.launch.hosts import Hosts
    from finetuning.launch.processes import Launch

_PRESETS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the options that stand before the command that is launched."""
    parser = argparse.ArgumentParser(
        prog="finetuning launch",
        description="Run a method in several processes, through accelerate's launcher:"
        " finetuning launch --nproc 8 --preset fsdp2 sft config.yaml",
    )
    parser.add_argument(
        "--nproc", default=None, help="processes on each machine: a number, or auto, one a GPU (default: auto)"
    )
    parser.add_argument("--nnodes", type=int, help="machines (default: what Kubeflow or SLURM say, else 1)")
    parser.add_argument("--node-rank", type=int, help="which machine this is, from 0")
    parser.add_argument("--main-address", metavar="HOST[:PORT]", help="where the first machine is met, port 29500")
    parser.add_argument(
        "--max-restarts",
        type=_whole_number,
        default=0,
        metavar="N",
        help="how often the job starts again, from its newest checkpoint, when a process or a machine is lost"
        " (default: 0)",
    )
    parser.add_argument(
        "--meet-within",
        type=_whole_number,
        metavar="SECONDS",
        help="how long machines wait for each other, at the start and after a loss (default: 600)",
    )
    sharding = parser.add_mutually_exclusive_group()
    sharding.add_argument("--preset", choices=_PRESETS, help="how the model is shared out (default: ddp)")
    sharding.add_argument("--accelerate-config", metavar="FILE", help="a config of accelerate's own, instead")
    parser.add_argument("--dry-run", action="store_true", help="print what accelerate launch would be given")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="METHOD config.yaml ...", help="what runs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    # Not our options but the command's, which stand behind it, may hold --debug.
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda _: _launch(arguments), arguments)


def _launch(argv: Sequence[str]) -> int:
    from finetuning.cli.main import METHODS
    from finetuning.config.validation.suggestions import did_you_mean
    from finetuning.launch.hosts import resolve_hosts
    from finetuning.launch.processes import start
    from finetuning.launch.restarts import run_with_restarts

    options = build_parser().parse_args(argv)
    if not options.command or options.command[0] not in METHODS:
        given = options.command[0] if options.command else "nothing"
        raise ConfigError(
            f"finetuning launch: {given} is no method; they are {', '.join(METHODS)}",
            hint=did_you_mean(given, METHODS),
        )
    machines = resolve_hosts(options.nnodes, options.node_rank, options.main_address)
    launch = _make_launch(options, machines)
    if options.dry_run:
        print("accelerate launch " + " ".join(launch.arguments(options.command)))
        return 0
    if options.max_restarts:
        _require_resuming(options.command)
    environment = machines.environment()
    before = reported_errors()
    code = run_with_restarts(lambda: start(launch, options.command, environment), options.max_restarts, _tell_restart)
    report_for_processes(code, before)
    return code


def _tell_restart(text: str) -> None:
    reset_error_file()
    print(f"warning: {text}", file=sys.stderr)


def _require_resuming(command: Sequence[str]) -> None:
    """Nothing, when what is launched would go on from its checkpoints if it were started again."""
    from finetuning.cli.main import build_parser as command_parser
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document

    options = command_parser().parse_intermixed_args(command)
    document = apply_overrides(read_document(options.config), options.overrides)
    run_conf = document.values.get("run_conf")
    wanted = run_conf.get("resume_from_checkpoint") if isinstance(run_conf, dict) else None
    if str(wanted).lower() != "auto":
        raise ConfigError(
            "--max-restarts goes on from the newest checkpoint of the run",
            place=document.location_of(("run_conf", "resume_from_checkpoint")),
            hint="Set run_conf.resume_from_checkpoint: auto, and have checkpoints saved (training_args.save_strategy).",
        )


def _make_launch(options: argparse.Namespace, machines: Hosts) -> Launch:
    from finetuning.launch.hosts import MEET_WITHIN_S
    from finetuning.launch.processes import Launch, preset_file, require_deepspeed

    config_file = None
    if options.preset:
        config_file = preset_file(options.preset)
    elif options.accelerate_config:
        config_file = Path(options.accelerate_config)
        require_deepspeed(config_file)
    per_machine = _per_machine(options.nproc or machines.nproc or "auto")
    if options.preset == "ddp" and per_machine * machines.nnodes == 1:
        config_file = None
    meet_within_s = options.meet_within or MEET_WITHIN_S
    return Launch(
        per_machine * machines.nnodes,
        machines.nnodes,
        config_file,
        tuple(machines.flags(meet_within_s)),
        meet_within_s if machines.nnodes > 1 else None,
    )


def _whole_number(text: str) -> int:
    """A number from 0, as argparse asks for it."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _per_machine(given: str) -> int:
    if given in ("auto", "gpu"):
        from finetuning.launch.processes import visible_gpus

        return visible_gpus() or 1
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"--nproc {given}: give a number from 1, or auto")
    return int(given)
